"""Whether a study's task can tell algorithms apart: asked before anything is read off the comparisons."""

from __future__ import annotations

import math

import pandas as pd

from .comparisons import SIGNIFICANCE
from .config import Qualification, StudyConfig
from .markdown import markdown_table
from .results import StudyResults, metrics_of
from .statistics import Difference, paired_difference


EXPLAINED_VARIANCE = "value_diagnostics/explained_variance"


def qualification_tests(wanted: Qualification, results: StudyResults) -> dict[str, Difference]:
    """
    The tests of a task's qualification; all have to come out above zero.

    Args:
        wanted ([`Qualification`]): what is asked.
        results ([`StudyResults`]): the finished runs.

    Returns:
        `dict[str, Difference]`: by what is tested. The exact arm minus each control, and the explained variance of
        Monte-Carlo values, in the last rollout of each run in which it was measured, minus zero. Tests without runs
        are left out.
    """
    tests = {}
    exact = results.scores(wanted.task, wanted.exact, wanted.seeds)
    for control in wanted.controls:
        scores = results.scores(wanted.task, control, wanted.seeds)
        if exact.keys() & scores.keys():
            tests[f"accuracy of `{wanted.exact}` minus that of `{control}`"] = paired_difference(exact, scores)
    for critic in wanted.critics:
        explained = {}
        for _, run in results.runs_of(wanted.task, [critic], wanted.seeds).iterrows():
            metrics = metrics_of(run)
            measured = metrics[EXPLAINED_VARIANCE].dropna() if EXPLAINED_VARIANCE in metrics else []
            if len(measured):
                explained[run["seed"]] = measured.iloc[-1]
        if explained:
            name = f"explained variance of Monte-Carlo values by the critic of `{critic}`"
            tests[name] = paired_difference(explained, dict.fromkeys(explained, 0.0))
    return tests


def write_qualification(study: StudyConfig, results: StudyResults) -> str:
    """The report's section on a study's qualification; empty if the study asks for none."""
    wanted = study.qualification
    if wanted is None:
        return ""
    tests = qualification_tests(wanted, results)
    # All have to hold, so none needs an adjustment for the others.
    held = {name: test.interval.value > 0 and test.p_value < SIGNIFICANCE for name, test in tests.items()}
    rows = [
        {
            "has to be above zero": name,
            "seeds": test.pairs,
            "mean": f"{test.interval.value:+.3f}",
            "95 % (Student)": "" if math.isnan(test.t_low) else f"[{test.t_low:+.3f}, {test.t_high:+.3f}]",
            "p": "" if math.isnan(test.p_value) else f"{test.p_value:.2g}",
            "holds": "yes" if held[name] else "**no**",
        }
        for name, test in tests.items()
    ]
    complete = len(tests) == len(wanted.controls) + len(wanted.critics)
    if complete and all(held.values()):
        verdict = f"`{wanted.task}` qualifies: what follows can tell algorithms apart."
    else:
        failed = [name for name, holds in held.items() if not holds]
        reason = "; ".join(failed) if failed else "some of its runs are missing"
        verdict = f"**`{wanted.task}` does not qualify** ({reason}): read what follows with that in mind."
    return (
        "## Can this task tell algorithms apart?\n\nA comparison of credit assignment means something only where "
        f"exact credit helps and values can be learned. {verdict}\n\n{markdown_table(pd.DataFrame(rows))}\n"
    )
