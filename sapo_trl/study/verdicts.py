"""The results of the tests that a study named before its runs. Nothing else is a verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from ..statistics import Interval
from .config import StudyConfig
from .preregistration import TESTED_MEASURES, RegisteredTest, changed_tests
from .results import StudyResults, scores_by_world
from .statistics import (
    blocked_contrast,
    fisher_p_value,
    holm,
    permutation_p_value,
    share_difference,
    trend_weights,
)


HELD, NOT_HELD, CANNOT_TELL = "held", "not held", "cannot tell"


@dataclass(frozen=True)
class Verdict:
    """
    The result of a preregistered test.

    Args:
        name (`str`): its name.
        test ([`RegisteredTest`]): the test.
        runs (`dict[str, int]`): finished runs by name in the contrast.
        worlds (`int`): worlds of these runs.
        effect ([`~sapo_trl.statistics.Interval`], *optional*): the effect with its 95 % interval; `None` without runs.
        p_value (`float`): NaN if it cannot be computed.
        p_adjusted (`float`): after Holm's correction within the family.
        agreeing (`int`): worlds in which the effect has the sign of the whole.
        verdict (`str`): `"held"`, `"not held"` or `"cannot tell"`.
        reason (`str`): why the verdict is `"cannot tell"` for another reason than the interval.
    """

    name: str
    test: RegisteredTest
    runs: dict[str, int]
    worlds: int
    effect: Interval | None
    p_value: float
    p_adjusted: float = math.nan
    agreeing: int = 0
    verdict: str = CANNOT_TELL
    reason: str = ""


def verdicts(study: StudyConfig, results: StudyResults) -> list[Verdict]:
    """
    The verdicts of a study.

    A claim is *held* if the adjusted p-value is below the family's level and the effect has the claimed sign. It is
    *not held* if the 95 % interval excludes every effect as large as the smallest that would matter. Otherwise the
    study *cannot tell*. A test without all of its runs has no p-value, and counts as 1 in the correction.

    Args:
        study ([`StudyConfig`]): the study.
        results ([`StudyResults`]): its finished runs.

    Returns:
        `list[Verdict]`: of the tests that were named before the first run, in the order of the study's file.
    """
    changed = set(changed_tests(study, results.output_dir))
    family = study.preregistered
    found = [_result(name, test, study, results) for name, test in family.tests.items() if name not in changed]
    adjusted = holm([verdict.p_value for verdict in found])
    return [
        Verdict(**{**vars(one), "p_adjusted": p, "verdict": _decide(one, p, family.level)})
        for one, p in zip(found, adjusted, strict=True)
    ]


def _decide(found: Verdict, p_adjusted: float, level: float) -> str:
    if found.effect is None or math.isnan(found.p_value):
        return CANNOT_TELL
    sign = -1 if found.test.side == "less" else 1
    if p_adjusted < level and found.effect.value * sign > 0:
        return HELD
    smallest = found.test.smallest
    if found.test.side == "two":
        # A difference in the other direction also contradicts the claim, which names the positive one.
        excluded = found.effect.high < smallest
    else:
        excluded = found.effect.high < smallest if sign > 0 else found.effect.low > -smallest
    return NOT_HELD if excluded else CANNOT_TELL


def _result(name: str, test: RegisteredTest, study: StudyConfig, results: StudyResults) -> Verdict:
    experiment = study.experiments[test.experiment]
    of_names = {}
    for key in test.contrast:
        cell = test.cell(key, experiment.tasks)
        of_names[key] = results.runs_of(experiment, cell.task, [cell.arm])
    counts = {key: len(runs) for key, runs in of_names.items()}
    worlds = {world for runs in of_names.values() for world in runs["world"]} if counts else set()
    expected = len(experiment.seeds) * len(experiment.worlds or [0])
    base = {"name": name, "test": test, "runs": counts, "worlds": len(worlds)}
    missing = sum(expected - count for count in counts.values())
    if missing:
        return Verdict(**base, effect=None, p_value=math.nan, reason=f"{missing} runs are missing")
    effect, p_value = _tested(test, of_names)
    signs = [_tested(test, of_world)[0].value * effect.value > 0 for of_world in _by_world(of_names)]
    return Verdict(**base, effect=effect, p_value=p_value, agreeing=sum(signs))


def _tested(test: RegisteredTest, of_names: dict[str, pd.DataFrame]) -> tuple[Interval, float]:
    weights = dict(test.contrast)
    if test.test == "trend":
        weights = dict(zip(weights, trend_weights(list(weights.values())), strict=True))
    if test.test == "fisher":
        pair = sorted(weights, key=weights.get, reverse=True)
        shares = [(int(of_names[key]["lost_form"].sum()), len(of_names[key])) for key in pair]
        return share_difference(*shares), fisher_p_value(*shares, test.side)
    contrast = blocked_contrast([(weights[key], scores_by_world(of_names[key], test.measure)) for key in weights])
    if test.test == "permutation":
        ours, theirs = sorted(weights, key=weights.get, reverse=True)
        counts = [scores_by_world(of_names[key], "correct") for key in (ours, theirs)]
        effect = contrast.interval
        # Accuracies differ by 1 at most.
        effect = Interval(effect.value, max(effect.low, -1.0), min(effect.high, 1.0))
        return effect, permutation_p_value(*counts, test.side)
    return contrast.interval, contrast.p_value(test.side)


def _by_world(of_names: dict[str, pd.DataFrame]) -> list[dict[str, pd.DataFrame]]:
    worlds = sorted({world for runs in of_names.values() for world in runs["world"]})
    return [{key: runs[runs["world"] == world] for key, runs in of_names.items()} for world in worlds]


def verdict_table(found: list[Verdict]) -> pd.DataFrame:
    """The report's first table: one row per claim."""
    return pd.DataFrame([_row(one) for one in found])


def _row(found: Verdict) -> dict[str, str]:
    test, effect = found.test, found.effect
    counts = sorted(set(found.runs.values()))
    source = f" ({test.source})" if test.source else ""
    scale = f"; needs {test.scale}" if test.scale else ""
    reason = f": {found.reason}" if found.reason else ""
    return {
        "claim": f"{test.claim}{source}",
        "test": f"{TESTED_MEASURES[test.measure]}, {_in_words(test)}",
        "runs": f"{' or '.join(map(str, counts))} each, {found.worlds} worlds",
        "effect [95 %]": "" if effect is None else f"{effect.value:+.3f} [{effect.low:+.3f}, {effect.high:+.3f}]",
        "smallest": f"{-test.smallest if test.side == 'less' else test.smallest:+g}",
        "worlds that agree": "" if effect is None else f"{found.agreeing} of {found.worlds}",
        "p": "" if math.isnan(found.p_value) else f"{found.p_value:.2g}",
        "p (Holm)": "" if math.isnan(found.p_value) else f"{found.p_adjusted:.2g}",
        "verdict": f"**{found.verdict}**{reason}{scale}",
    }


def _in_words(test: RegisteredTest) -> str:
    signs = " ".join(
        f"{'+' if number >= 0 else '−'}{'' if abs(number) == 1 else f'{abs(number):g} '}`{name}`"
        for name, number in test.contrast.items()
    )
    if test.test == "trend":
        signs = "slope over " + ", ".join(f"`{name}` ({number:g})" for name, number in test.contrast.items())
    kind = {"welch": "Welch in worlds", "trend": "Welch in worlds", "permutation": "permutation", "fisher": "Fisher"}
    sides = {"two": "two-sided", "greater": "one-sided", "less": "one-sided, below 0"}
    return f"{signs.removeprefix('+')}: {kind[test.test]}, {sides[test.side]}"
