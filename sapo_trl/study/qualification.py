"""Tests whether a study's task can tell algorithms apart. Only then can its comparisons be interpreted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from ..names import markdown_table
from .comparisons import SIGNIFICANCE
from .config import Qualification, StudyConfig
from .results import StudyResults, metrics_of
from .statistics import Difference, paired_difference


EXPLAINED_VARIANCE = "critic/diagnostics/explained_variance"


@dataclass(frozen=True)
class QualificationTests:
    """
    The tests of a task's qualification, by the tested quantity.

    Args:
        controls (`dict[str, Difference]`): the accuracy of the exact arm minus each control's.
        critics (`dict[str, Difference]`):
            the explained variance of Monte-Carlo values by each critic, compared with zero. It is read in the last
            rollout of each run in which it was measured.
    """

    controls: dict[str, Difference]
    critics: dict[str, Difference]


def qualification_tests(wanted: Qualification, results: StudyResults) -> QualificationTests:
    """
    Test a task's qualification.

    Args:
        wanted ([`Qualification`]): the conditions.
        results ([`StudyResults`]): the finished runs.

    Returns:
        [`QualificationTests`]. Tests without runs are left out.
    """
    return QualificationTests(_control_tests(wanted, results), _critic_tests(wanted, results))


def _control_tests(wanted: Qualification, results: StudyResults) -> dict[str, Difference]:
    tests = {}
    exact = results.scores(wanted.task, wanted.exact, wanted.seeds)
    for control in wanted.controls:
        scores = results.scores(wanted.task, control, wanted.seeds)
        if exact.keys() & scores.keys():
            tests[f"accuracy of `{wanted.exact}` minus accuracy of `{control}`"] = paired_difference(exact, scores)
    return tests


def _critic_tests(wanted: Qualification, results: StudyResults) -> dict[str, Difference]:
    tests = {}
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


def _holds(test: Difference, level: float) -> bool:
    return test.interval.value > 0 and test.p_value < level


def _failed(tests: QualificationTests, level: float) -> list[str]:
    """The failed tests, by the tested quantity."""
    failed = [name for name, test in tests.controls.items() if not _holds(test, level)]
    # If one critic does not learn values, the fault lies with the critic. If no critic does, it lies with the task.
    if tests.critics and not any(_holds(test, level) for test in tests.critics.values()):
        failed += tests.critics
    return failed


def _table(tests: QualificationTests, level: float) -> str:
    rows = [
        {
            "must be above zero": name,
            "seeds": test.pairs,
            "mean": f"{test.interval.value:+.3f}",
            "95 % (Student)": "" if math.isnan(test.t_low) else f"[{test.t_low:+.3f}, {test.t_high:+.3f}]",
            "p": "" if math.isnan(test.p_value) else f"{test.p_value:.2g}",
            "p (ranks)": "" if math.isnan(test.rank_p_value) else f"{test.rank_p_value:.2g}",
            "holds": "yes" if _holds(test, level) else "**no**",
        }
        for name, test in (tests.controls | tests.critics).items()
    ]
    return markdown_table(pd.DataFrame(rows))


def write_qualification(study: StudyConfig, results: StudyResults) -> str:
    """The report's section on a study's qualification; empty if the study asks for none."""
    wanted = study.qualification
    if wanted is None:
        return ""
    tests = qualification_tests(wanted, results)
    # A reader who looks several times, and stops at the first pleasing result, has several chances to be wrong.
    level = SIGNIFICANCE / wanted.looks
    failed = _failed(tests, level)
    if len(tests.controls) < len(wanted.controls) or len(tests.critics) < len(wanted.critics):
        failed = failed or ["some of its runs are missing"]
    if failed:
        verdict = f"**`{wanted.task}` does not qualify** ({'; '.join(failed)}): be careful with the comparisons below."
    else:
        verdict = f"`{wanted.task}` qualifies: the comparisons below can tell algorithms apart."
    note = f"\n{wanted.note.strip()}\n" if wanted.note.strip() else ""
    return (
        "## Can this task tell algorithms apart?\n\nTwo conditions must hold before the task can compare methods of "
        "credit assignment. Exact credit must beat every control, and at least one critic must learn the values. "
        f"{verdict}\n\n{_table(tests, level)}\n\nThe t-test's `p` decides, at level {level:.2g}"
        + (f" ({SIGNIFICANCE:.2g} divided by {wanted.looks} looks)" if wanted.looks > 1 else "")
        + f". `p (ranks)` comes from Wilcoxon's test, on which a single broken run has little influence.\n{note}"
    )
