"""A study's experiments as tables of numbers. They explore: nothing here is tested."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from .config import Experiment, StudyConfig
from .results import StudyResults, scores_by_world
from .statistics import blocked_contrast, median_interval


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
            one row per arm with finished runs, the best first: `arm`, `runs`, the mean `log_odds` and
            `reading_log_odds`, each with the ends of its Student interval (`_low`, `_high`; NaN without two runs in
            each world), the median `accuracy` with its ends (NaN with fewer than six runs), `mean_accuracy`,
            `lost_form` and `failed` (numbers of runs), `difference` in log-odds to the study's baseline with its ends
            (NaN unless both have the same worlds), and the mean costs.
    """

    name: str
    experiment: Experiment
    task: str
    table: pd.DataFrame


def comparisons(study: StudyConfig, results: StudyResults) -> list[Comparison]:
    """Every experiment and task with finished runs, in the order of the study."""
    found = []
    for name, experiment in study.experiments.items():
        if experiment.measure == "accuracy":
            for task in experiment.tasks:
                table = _table(results, experiment, task, study.baseline)
                if not table.empty:
                    found.append(Comparison(name, experiment, task, table))
    return found


def _table(results: StudyResults, experiment: Experiment, task: str, baseline: str) -> pd.DataFrame:
    reference = scores_by_world(results.runs_of(experiment, task, [baseline]), "log_odds")
    rows = []
    for arm in experiment.arms:
        runs = results.runs_of(experiment, task, [arm])
        if runs.empty:
            continue
        accuracy = median_interval(runs["accuracy"])
        ours = scores_by_world(runs, "log_odds")
        row = {
            "arm": arm,
            "runs": len(runs),
            **_interval("log_odds", [(1.0, ours)]),
            **_interval("reading_log_odds", [(1.0, scores_by_world(runs, "reading_log_odds"))]),
            "accuracy": accuracy.value,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            "mean_accuracy": runs["accuracy"].mean(),
            "lost_form": int(runs["lost_form"].sum()),
            "failed": int(runs["failed"].notna().sum()),
            **_interval("difference", [(1.0, ours), (-1.0, reference)] if arm != baseline else []),
            **{column: runs[column].mean() for column in COSTS},
        }
        rows.append(row)
    table = pd.DataFrame(rows)
    return table if table.empty else table.sort_values("log_odds", ascending=False, ignore_index=True, kind="stable")


def _interval(name: str, cells: Sequence) -> dict[str, float]:
    """The contrast with the ends of its interval; NaN if there are too few runs, or none to compare with."""
    names = (name, f"{name}_low", f"{name}_high")
    if not cells or any(scores.keys() != cells[0][1].keys() for _, scores in cells):
        return dict.fromkeys(names, math.nan)
    if any(len(row) < 2 for _, scores in cells for row in scores.values()):
        value = sum(weight * _mean(scores) for weight, scores in cells)
        return dict(zip(names, (value, math.nan, math.nan), strict=True))
    interval = blocked_contrast(cells).interval
    return dict(zip(names, (interval.value, interval.low, interval.high), strict=True))


def _mean(scores: dict[int, list[float]]) -> float:
    return sum(sum(row) / len(row) for row in scores.values()) / len(scores)
