"""Reads the recorded files of a run as tables for analyses."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .columns import INTEGER, NUMBERS, REWARD, TOKEN_COLUMNS, VALUE_COLUMNS
from .tables import read_frame, recorded_files


logger = logging.getLogger(__name__)

_STATE_COLUMNS = ("response", "segment", "value", "monte_carlo_value", "standard_error")


def read_responses(
    folder: str | Path, columns: tuple[str, ...] = ("segment_ids", "entropies", "values")
) -> pd.DataFrame:
    """
    Read the files of a [`~sapo_trl.SegmentationCallback`].

    Args:
        folder (`str` or `Path`):
            folder with its files (`segments_<step>_<process>.parquet` or `.json`), or one of the folders above it.
        columns (`tuple[str]`, *optional*):
            lists with one entry per loss token that are needed, of [`~sapo_trl.recordings.segmented_responses`].

    Returns:
        `pd.DataFrame`: one row per response, in the order of step, process and place in the rollout: `step`,
        `process`, `response` (its place, which [`~sapo_trl.ValueDiagnostics`] counts alike), `reward` (NaN if
        unscored) and the asked `columns` as arrays.

    Raises:
        ValueError: if there is no such folder or file, or if a file is damaged or lacks a column.
    """
    frames = []
    for path, step, process in recorded_files(Path(folder), "segments", ("parquet", "json"), "SegmentationCallback"):
        kinds = {name: replace(TOKEN_COLUMNS.get(name, NUMBERS), optional=False) for name in columns}
        frame, notes = read_frame(path, {"step": INTEGER, "reward": REWARD, **kinds})
        for note in notes:
            logger.warning(note)
        lengths = frame[list(columns)].map(len)
        if (uneven := lengths.nunique(axis=1) > 1).any():
            row = int(uneven.to_numpy().argmax())
            raise ValueError(f"{path}: the lists of response {row} differ in length: {lengths.iloc[row].to_dict()}.")
        frame = frame[["reward", *columns]].assign(step=step, process=process, response=np.arange(len(frame)))
        frames.append(frame.assign(reward=frame["reward"].astype(float)))
    return pd.concat(frames, ignore_index=True)[["step", "process", "response", "reward", *columns]]


def read_values(folder: str | Path) -> pd.DataFrame:
    """
    Read the files of a [`~sapo_trl.ValueDiagnostics`].

    Args:
        folder (`str` or `Path`):
            folder with its files (`values_<step>_<process>.parquet`), or one of the folders above it.

    Returns:
        `pd.DataFrame`: one row per valued state: `step`, `process`, `response`, `segment`, `value`,
        `monte_carlo_value`, `standard_error`.

    Raises:
        ValueError: if there is no such folder or file, or if a file is damaged or lacks a column.
    """
    kinds = {name: VALUE_COLUMNS[name] for name in _STATE_COLUMNS}
    frames = [
        read_frame(path, kinds)[0][list(kinds)].assign(step=step, process=process)
        for path, step, process in recorded_files(Path(folder), "values", ("parquet",), "ValueDiagnostics")
    ]
    return pd.concat(frames, ignore_index=True)[["step", "process", *_STATE_COLUMNS]]


def flatten(responses: pd.DataFrame, columns: tuple[str, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """
    The tokens of all responses as one long table.

    Args:
        responses (`pd.DataFrame`): of `R` responses, from [`read_responses`].
        columns (`tuple[str]`): of its lists.

    Returns:
        `tuple[np.ndarray, dict[str, np.ndarray]]`: int64 `(N,)`, for each of `N` tokens its row of `responses`, in
        order; and the columns, each `(N,)`.
    """
    lengths = responses[columns[0]].map(len).to_numpy(dtype=np.int64)
    flat: dict[str, Any] = {name: np.concatenate([np.zeros(0), *responses[name]]) for name in columns}
    return np.repeat(np.arange(len(responses)), lengths), flat
