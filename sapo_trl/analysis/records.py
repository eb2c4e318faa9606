"""The records of finished runs. Errors name the file and its fault."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyarrow import ArrowInvalid

from ..run_folder import TRAINER_STATE_NAME, newest_checkpoint


TOKEN_COLUMNS = ("tokens", "segment_ids", "logps", "entropies", "values", "advantages", "returns")
VALUE_COLUMNS = ("response", "segment", "value", "monte_carlo_value", "standard_error")


def read_responses(
    folder: str | Path, columns: tuple[str, ...] = ("segment_ids", "entropies", "values")
) -> pd.DataFrame:
    """
    Read the files of a [`~sapo_trl.SegmentationCallback`].

    Args:
        folder (`str` or `Path`):
            folder with its files (`segments_<step>_<process>.parquet` or `.json`), or one of the folders above it.
        columns (`tuple[str]`, *optional*):
            lists with one entry per loss token that are needed, of [`~sapo_trl.callbacks.segmented_responses`].

    Returns:
        `pd.DataFrame`: one row per response, in the order of step, process and place in the rollout: `step`,
        `process`, `response` (its place, which [`~sapo_trl.ValueDiagnostics`] counts alike), `reward` (NaN if
        unscored) and the asked `columns` as arrays.

    Raises:
        ValueError: if there is no such folder or file, or if a file is damaged or lacks a column.
    """
    frames = []
    for path, step, process in recorded_files(Path(folder), "segments", ("parquet", "json"), "SegmentationCallback"):
        frame = read_frame(path, ("step", "reward", *columns))
        lengths = frame[list(columns)].map(lambda cell: len(cell) if hasattr(cell, "__len__") else -1)
        if (scalar := (lengths < 0).any()).any():
            raise ValueError(f"{path}: column `{scalar.idxmax()}` must hold one list per response.")
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
    frames = [
        read_frame(path, VALUE_COLUMNS)[list(VALUE_COLUMNS)].assign(step=step, process=process)
        for path, step, process in recorded_files(Path(folder), "values", ("parquet",), "ValueDiagnostics")
    ]
    return pd.concat(frames, ignore_index=True)[["step", "process", *VALUE_COLUMNS]]


def read_log_history(path: str | Path) -> pd.DataFrame:
    """
    Read a run's log.

    Args:
        path (`str` or `Path`):
            a `trainer_state.json` (checkpoints have one; `trainer.save_state()` writes one into the output folder), a
            file with one JSON object per line (`.jsonl`), or a folder. In a folder the first of these counts: its
            `trainer_state.json`, its last checkpoint's, its only `.jsonl` file.

    Returns:
        `pd.DataFrame`: one row per entry, in order, NaN where an entry lacks a name.

    Raises:
        ValueError: if there is no log, or if it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = _log_file(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file or folder.")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = json.loads(text)["log_history"]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: no `log_history` in it; a `trainer_state.json` or a `.jsonl` is read.") from error
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: the log must have at least one entry, each an object of names and numbers.")
    return pd.DataFrame(entries)


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


def recorded_files(folder: Path, kind: str, formats: tuple[str, ...], writer: str) -> list[tuple[Path, int, int]]:
    """
    Files `<kind>_<step>_<process>.<format>` in a folder, or in the only folder below it with such files.

    Args:
        folder (`Path`): where to look.
        kind (`str`): first word of their names.
        formats (`tuple[str]`): endings of their names.
        writer (`str`): the callback that writes them, for the error.

    Returns:
        `list[tuple[Path, int, int]]`: path, step and process, in the order of the latter two.

    Raises:
        ValueError: if there is no such folder or file, if several folders have some, or one rollout is there twice.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder.")
    name = re.compile(rf"{kind}_(\d+)_(\d+)\.({'|'.join(formats)})")
    found = [(path, match) for path in folder.rglob(f"{kind}_*") if (match := name.fullmatch(path.name))]
    if not found:
        patterns = " or ".join(f"{kind}_<step>_<process>.{format_}" for format_ in formats)
        raise ValueError(f"{folder}: no file {patterns} in it; `{writer}(output_dir=…)` writes them during training.")
    # Files in the folder itself take precedence over files further down.
    folders = sorted({path.parent for path, _ in found}, key=lambda parent: (parent != folder, parent))
    if folders[0] != folder and len(folders) > 1:
        raise ValueError(f"{folder}: several folders in it have such files; name one of {[str(f) for f in folders]}.")
    chosen = [(path, int(match[1]), int(match[2])) for path, match in found if path.parent == folders[0]]
    chosen.sort(key=lambda entry: entry[1:])
    places = [entry[1:] for entry in chosen]
    for (path, *place), previous in zip(chosen[1:], places, strict=False):
        if tuple(place) == previous:
            raise ValueError(f"{path}: its rollout is there in two formats; keep one.")
    return chosen


def read_frame(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """
    Read a recorded file.

    Args:
        path (`Path`): a Parquet file, or one with a JSON object on each line.
        columns (`tuple[str]`): columns that it must have.

    Returns:
        `pd.DataFrame`: all of its columns.

    Raises:
        ValueError: if it is damaged or lacks a column.
    """
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            frame = pd.DataFrame([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    except (ArrowInvalid, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a {path.suffix[1:]} file ({str(error).splitlines()[0]}).") from error
    missing = [name for name in columns if name not in frame]
    if missing:
        raise ValueError(f"{path}: column `{missing[0]}` is missing; it has {sorted(frame.columns)}.")
    return frame


def _log_file(folder: Path) -> Path:
    if (folder / TRAINER_STATE_NAME).is_file():
        return folder / TRAINER_STATE_NAME
    if (checkpoint := newest_checkpoint(folder)) is not None:
        return checkpoint / TRAINER_STATE_NAME
    lines = sorted(folder.glob("*.jsonl"))
    if len(lines) != 1:
        raise ValueError(
            f"{folder}: neither a `{TRAINER_STATE_NAME}`, nor a checkpoint with one, nor exactly one `.jsonl` file "
            f"(it has {len(lines)}). `trainer.save_state()` writes the first."
        )
    return lines[0]
