"""A study's finished runs as tables."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..json_files import read_json_lines
from ..metric_names import with_present_names
from .cells import Cell, comparison_cells, result_of, tuning_cells
from .config import StudyConfig
from .run_cell import METRICS_NAME
from .runner import CELLS_FOLDER
from .tuning import chosen_learning_rates, tuning_table


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyResults:
    """
    The results of a study.

    Args:
        runs (`pd.DataFrame`):
            one row per finished comparison run: the content of its `result.json`, its arm's `samples`, its `folder`.
        tuning (`pd.DataFrame`): one row per tuning run.
        learning_rates (`dict[str, float]`): the chosen learning rates, by tuned arm.
        missing (`list[str]`): names of the runs that are not finished.
    """

    runs: pd.DataFrame
    tuning: pd.DataFrame
    learning_rates: dict[str, float]
    missing: list[str]

    def scores(
        self, task: str, arm: str, seeds: Collection[int] | None = None, column: str = "accuracy"
    ) -> dict[int, Any]:
        """
        One result of an arm's run on a task, for each seed.

        Args:
            task (`str`): the task.
            arm (`str`): the arm.
            seeds (`Collection[int]`, *optional*): seeds of an experiment; by default all seeds with a finished run.
            column (`str`, *optional*, defaults to `"accuracy"`): column to read.

        Returns:
            `dict[int, Any]`: by seed; empty without a finished run.
        """
        chosen = self.runs_of(task, [arm], seeds)
        return {} if chosen.empty else dict(zip(chosen["seed"], chosen[column], strict=True))

    def runs_of(self, task: str, arms: Collection[str], seeds: Collection[int] | None = None) -> pd.DataFrame:
        """The finished runs of some arms on a task, if their accuracy was measured."""
        runs = self.runs
        is_chosen = (runs["task"] == task) & runs["arm"].isin(arms) & (runs["measure"] == "accuracy")
        return runs[is_chosen & (True if seeds is None else runs["seed"].isin(seeds))]


def load_results(study: StudyConfig, output_dir: str | Path) -> StudyResults:
    """
    Read the finished runs of a study.

    Args:
        study ([`StudyConfig`]): the study.
        output_dir (`str` or `Path`): its folder.

    Returns:
        [`StudyResults`]. Raises `ValueError` if its tuning is not finished.
    """
    cells_dir = Path(output_dir) / CELLS_FOLDER
    tuning = [(cell, result_of(cells_dir / cell.name)) for cell in tuning_cells(study)]
    open_runs = [cell.name for cell, result in tuning if result is None]
    if open_runs:
        raise ValueError(
            f"{len(open_runs)} of {len(tuning)} tuning runs are not finished in {str(output_dir)!r}, for example "
            f"{open_runs[0]!r}: run the study first, or again to continue it."
        )
    learning_rates = chosen_learning_rates(tuning)
    rows, missing = [], []
    for cell in comparison_cells(study, learning_rates):
        result = result_of(cells_dir / cell.name)
        if result is None:
            missing.append(cell.name)
        else:
            rows.append(_row(cell, result, cells_dir / cell.name))
    if not rows:
        raise ValueError(f"No comparison run is finished in {str(output_dir)!r}: run the study again to continue it.")
    return StudyResults(pd.DataFrame(rows), tuning_table(tuning), learning_rates, missing)


def metrics_of(run: pd.Series) -> pd.DataFrame:
    """The log of a run, one row per rollout, with the number of responses that it had trained on before."""
    rows, notes = read_json_lines(Path(run["folder"]) / METRICS_NAME)
    for note in notes:
        logger.warning(note)
    metrics = pd.DataFrame([with_present_names(row) for row in rows])
    per_rollout = run["completions"] / max(len(metrics), 1)
    metrics["completions"] = [index * per_rollout for index in range(len(metrics))]
    metrics["cpu_seconds"] = [index * run["cpu_seconds"] / max(len(metrics), 1) for index in range(len(metrics))]
    return metrics


def _row(cell: Cell, result: dict[str, Any], folder: Path) -> dict[str, Any]:
    # The names are the cell's: a result may have been edited.
    own = {"arm": cell.arm_name, "task": cell.task_name, "seed": cell.seed}
    return {**result, **own, "samples": cell.arm.samples, "folder": str(folder)}
