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
    The tests of a task's qualification.

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
    held = {name: test.interval.value > 0 and test.p_value < SIGNIFICANCE for name, test in tests.items()}
    rows = [
        {
            "has to be above zero": name,
            "seeds": test.pairs,
            "mean": f"{test.interval.value:+.3f}",
            "95 % (Student)": "" if math.isnan(test.t_low) else f"[{test.t_low:+.3f}, {test.t_high:+.3f}]",
            "p": "" if math.isnan(test.p_value) else f"{test.p_value:.2g}",
            "p (ranks)": "" if math.isnan(test.rank_p_value) else f"{test.rank_p_value:.2g}",
            "holds": "yes" if held[name] else "**no**",
        }
        for name, test in tests.items()
    ]
    names = list(tests)
    controls = [name for name in names if name.startswith("accuracy")]
    critics = [name for name in names if name not in controls]
    failed = [name for name in controls if not held[name]]
    # That one critic does not learn values is about that critic; that none does is about the task.
    if critics and not any(held[name] for name in critics):
        failed += critics
    if len(tests) < len(wanted.controls) + len(wanted.critics):
        failed = failed or ["some of its runs are missing"]
    if failed:
        verdict = f"**`{wanted.task}` does not qualify** ({'; '.join(failed)}): read what follows with that in mind."
    else:
        verdict = f"`{wanted.task}` qualifies: what follows can tell algorithms apart."
    return (
        "## Can this task tell algorithms apart?\n\nA comparison of credit assignment means something only where "
        "exact credit helps, against every control, and values can be learned, by one critic at least. "
        f"{verdict}\n\n{markdown_table(pd.DataFrame(rows))}\n\n`p` is of a t-test, which decides; *ranks* are "
        "Wilcoxon's, which single broken runs do not sway.\n"
    )
