"""A study's experiments as tables of numbers: accuracies, paired differences to the baseline, verdicts, costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from .config import Experiment, StudyConfig
from .results import StudyResults
from .statistics import adjusted_p_values, mean_interval, paired_difference


SIGNIFICANCE = 0.05
COSTS = ("completions", "optimizer_steps", "rollout_tokens", "sampled_tokens", "cpu_seconds")


@dataclass(frozen=True)
class Comparison:
    """
    One experiment's arms on one of its tasks.

    Args:
        name (`str`): name of the experiment.
        experiment ([`Experiment`]): the experiment.
        task (`str`): the task.
        table (`pd.DataFrame`):
            one row per arm with finished runs, the best first: `arm`, `seeds`, `accuracy` with its bootstrap interval
            (`low`, `high`), `greedy_accuracy`, `difference` with Student's interval (`t_low`, `t_high`), `p_value`,
            `p_adjusted`, `failed` (runs that diverged) and the mean costs.
    """

    name: str
    experiment: Experiment
    task: str
    table: pd.DataFrame


def comparisons(study: StudyConfig, results: StudyResults) -> list[Comparison]:
    """
    Every comparison of a study with finished runs.

    P-values are adjusted for the number of all comparisons of the study. A comparison in several experiments counts
    once.

    Args:
        study ([`StudyConfig`]): the study.
        results ([`StudyResults`]): its finished runs.

    Returns:
        `list[Comparison]`: in the order of the study.
    """
    found = []
    for name, experiment in study.experiments.items():
        if experiment.measure == "accuracy":
            for task in experiment.tasks:
                table = _table(results, task, experiment.arms, study.baseline, experiment.seeds)
                if not table.empty:
                    found.append(Comparison(name, experiment, task, table))
    p_values = {}
    for comparison in found:
        for _, row in comparison.table.iterrows():
            p_values[_key(comparison, row)] = row["p_value"]
    adjusted = dict(zip(p_values, adjusted_p_values(list(p_values.values())), strict=True))
    for comparison in found:
        comparison.table["p_adjusted"] = [adjusted[_key(comparison, row)] for _, row in comparison.table.iterrows()]
    return found


def verdict(row: pd.Series) -> str:
    """
    The verdict on a comparison's arm: `"better"`, `"worse"`, `"not significant"`, `"not tested"` (a single pair of
    runs, or equal differences in all pairs), or `""` if there is no run to compare with.
    """
    if math.isnan(row["difference"]):
        return ""
    if math.isnan(row["p_adjusted"]):
        return "not tested"
    if row["p_adjusted"] >= SIGNIFICANCE:
        return "not significant"
    return "better" if row["difference"] > 0 else "worse"


def _key(comparison: Comparison, row: pd.Series) -> tuple:
    return comparison.task, row["arm"], tuple(comparison.experiment.seeds)


def _table(results: StudyResults, task: str, arms: Sequence[str], baseline: str, seeds: Sequence[int]) -> pd.DataFrame:
    reference = results.scores(task, baseline, seeds)
    rows = []
    for arm in arms:
        scores = results.scores(task, arm, seeds)
        if not scores:
            continue
        accuracy = mean_interval(list(scores.values()))
        greedy = results.scores(task, arm, seeds, "greedy_accuracy")
        row = {
            "arm": arm,
            "seeds": len(scores),
            "accuracy": accuracy.value,
            "low": accuracy.low,
            "high": accuracy.high,
            "greedy_accuracy": sum(greedy.values()) / len(greedy),
            **dict.fromkeys(("difference", "t_low", "t_high", "p_value"), math.nan),
            "failed": sum(failed is not None for failed in results.scores(task, arm, seeds, "failed").values()),
        }
        if arm != baseline and scores.keys() & reference.keys():
            difference = paired_difference(scores, reference)
            row |= {
                "difference": difference.interval.value,
                "t_low": difference.t_low,
                "t_high": difference.t_high,
                "p_value": difference.p_value,
            }
        for column in COSTS:
            costs = results.scores(task, arm, seeds, column)
            row[column] = sum(costs.values()) / len(costs)
        rows.append(row)
    table = pd.DataFrame(rows)
    return table if table.empty else table.sort_values("accuracy", ascending=False, ignore_index=True, kind="stable")
