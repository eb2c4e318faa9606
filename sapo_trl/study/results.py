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
from .cells import Cell, Choice, comparison_cells, result_of, tuning_cells
from .config import Experiment, StudyConfig
from .run_cell import METRICS_NAME
from .runner import CELLS_FOLDER
from .tuning import chosen_settings, tuning_table


logger = logging.getLogger(__name__)

COMPLETE = 0.5
"""A run whose share of complete responses is below this has lost its form."""


@dataclass(frozen=True)
class StudyResults:
    """
    The results of a study.

    Args:
        runs (`pd.DataFrame`):
            one row per finished comparison run: the content of its `result.json`, its arm's `samples`, its `folder`,
            `own_world`, the world of its task in the study's file, and `lost_form`: whether fewer than half of its
            responses have all steps.
        tuning (`pd.DataFrame`): one row per tuning run.
        chosen (`dict[str, Choice]`): the chosen settings, by tuned arm.
        missing (`list[str]`): names of the runs that are not finished.
        output_dir (`Path`): the study's folder.
    """

    runs: pd.DataFrame
    tuning: pd.DataFrame
    chosen: dict[str, Choice]
    missing: list[str]
    output_dir: Path

    def runs_of(self, experiment: Experiment, task: str, arms: Collection[str] | None = None) -> pd.DataFrame:
        """
        An experiment's finished runs on one of its tasks, if their accuracy was measured.

        Args:
            experiment ([`Experiment`]): the experiment.
            task (`str`): one of its tasks.
            arms (`Collection[str]`, *optional*): arms; by default all of the experiment.
        """
        runs = self.runs
        chosen = (runs["task"] == task) & runs["arm"].isin(experiment.arms if arms is None else arms)
        chosen &= (runs["measure"] == "accuracy") & runs["seed"].isin(experiment.seeds)
        # Without worlds in the experiment it is the task's own one; other experiments may have more.
        chosen &= runs["world"].isin(experiment.worlds) if experiment.worlds else runs["world"] == runs["own_world"]
        return runs[chosen]


def scores_by_world(runs: pd.DataFrame, column: str) -> dict[int, list]:
    """A column of some runs, by world, in the order of seeds."""
    return {int(world): of_world[column].tolist() for world, of_world in runs.sort_values("seed").groupby("world")}


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
    choices = {name: arm.choices for name, arm in study.arms.items()}
    chosen = chosen_settings(tuning, choices)
    rows, missing = [], []
    for cell in comparison_cells(study, chosen):
        result = result_of(cells_dir / cell.name)
        if result is None:
            missing.append(cell.name)
        else:
            own_world = study.tasks[cell.task_name].world
            rows.append({**_row(cell, result, cells_dir / cell.name), "own_world": own_world})
    if not rows:
        raise ValueError(f"No comparison run is finished in {str(output_dir)!r}: run the study again to continue it.")
    table = tuning_table(tuning, choices) if tuning else pd.DataFrame()
    return StudyResults(pd.DataFrame(rows), table, chosen, missing, Path(output_dir))


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
    own = {"arm": cell.arm_name, "task": cell.task_name, "world": cell.task.world, "seed": cell.seed}
    lost_form = {"lost_form": result["complete"] < COMPLETE} if cell.measure == "accuracy" else {}
    more = {"samples": cell.arm.samples, "test_problems": cell.budget.test_problems, "folder": str(folder)}
    return {**result, **own, **lost_form, **more}
