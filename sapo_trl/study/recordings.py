"""A study's recordings and logs as a few small files, which can be published with its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..recordings.reading import read_responses, read_values
from ..recordings.writing import write_frame
from .results import StudyResults, metrics_of
from .run_cell import RESPONSES_FOLDER, VALUES_FOLDER


RUN = ("arm", "task", "world", "seed")
"""Columns that name a run."""
LOGGED = (
    "reward",
    "entropy",
    "completions/mean_length",
    "critic/loss",
    "critic/explained_variance",
    "critic/diagnostics/explained_variance",
    "ratio/geometric_bias",
    "ratio/geometric_bias_bound",
    "advantages/zeroed",
)
_LISTS = ("tokens", "segment_ids", "entropies", "values")
_RESPONSE = ("step", "process", "response", "reward", *_LISTS)
_STATE = ("step", "process", "response", "segment", "value", "monte_carlo_value", "standard_error")


@dataclass(frozen=True)
class Recordings:
    """
    The recordings of all recorded runs.

    Args:
        responses (`pd.DataFrame`): a row per response, with the run's `RUN` columns.
        values (`pd.DataFrame`): a row per valued state.
        logs (`pd.DataFrame`): a row per rollout of every run.
    """

    responses: pd.DataFrame
    values: pd.DataFrame
    logs: pd.DataFrame


def collect(results: StudyResults) -> Recordings:
    """
    Read the recordings of a study. Entropies and values are rounded to 1e-3, so that the files are small.

    Args:
        results ([`StudyResults`]): its finished runs.

    Returns:
        [`Recordings`]: tables without rows where nothing was recorded.
    """
    responses, values, logs = [], [], []
    for _, run in results.runs[results.runs["measure"] == "accuracy"].iterrows():
        folder, named = Path(run["folder"]), {name: run[name] for name in RUN}
        metrics = metrics_of(run)
        kept = metrics.reindex(columns=["step", *LOGGED]).assign(rollout=range(len(metrics)), **named)
        logs.append(kept)
        if (folder / RESPONSES_FOLDER).is_dir():
            table = read_responses(folder / RESPONSES_FOLDER, _LISTS).reindex(columns=_RESPONSE)
            for name in ("entropies", "values"):
                table[name] = [np.round(np.asarray(row, dtype=np.float32), 3) for row in table[name]]
            responses.append(table.assign(**named))
        if (folder / VALUES_FOLDER).is_dir():
            values.append(read_values(folder / VALUES_FOLDER).reindex(columns=_STATE).assign(**named))
    return Recordings(
        responses=pd.concat(responses, ignore_index=True) if responses else pd.DataFrame(columns=[*_RESPONSE, *RUN]),
        values=pd.concat(values, ignore_index=True) if values else pd.DataFrame(columns=[*_STATE, *RUN]),
        logs=pd.concat(logs, ignore_index=True) if logs else pd.DataFrame(columns=["step", "rollout", *LOGGED, *RUN]),
    )


def write_recordings(recordings: Recordings, folder: Path) -> list[Path]:
    """Write the tables as Parquet files, and return their paths."""
    paths = []
    for name in ("responses", "values", "logs"):
        path = folder / f"{name}.parquet"
        write_frame(path, getattr(recordings, name))
        paths.append(path)
    return paths


def read_recordings(folder: Path) -> Recordings:
    """Read tables that [`write_recordings`] has written."""
    return Recordings(
        **{name: pd.read_parquet(folder / f"{name}.parquet") for name in ("responses", "values", "logs")}
    )


def by_run(table: pd.DataFrame) -> list[tuple[tuple, pd.DataFrame]]:
    """The rows of each run, with the values of its `RUN` columns."""
    return [(key, rows.reset_index(drop=True)) for key, rows in table.groupby(list(RUN), sort=True)]
