"""The records of finished runs. Errors name the file and its fault."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyarrow import ArrowException

from ..json_files import read_json, read_json_lines
from ..run_folder import TRAINER_STATE_NAME, newest_checkpoint


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """
    The kind of the cells of a column.

    Args:
        words (`str`): for errors.
        fits (`Callable`): whether a cell is one.
        optional (`bool`, *optional*, defaults to `False`): whether the column may be missing, or a cell be empty.
    """

    words: str
    fits: Callable[[Any], bool]
    optional: bool = False


def holds(kinds: str) -> Callable[[Any], bool]:
    """Whether a cell is a list whose entries have one of these kinds of NumPy's types."""

    def fits(cell: Any) -> bool:
        try:
            array = np.asarray(cell)
        except ValueError:  # rows of different lengths
            return False
        return array.ndim == 1 and (array.size == 0 or array.dtype.kind in kinds)

    return fits


def _are_texts(cell: Any) -> bool:
    # Not by NumPy: one long text would make every other one as large.
    return isinstance(cell, list | np.ndarray) and all(isinstance(entry, str) for entry in cell)


def _is_number(cell: Any) -> bool:
    try:
        return isinstance(cell, Real) and isinstance(float(cell), float)
    except OverflowError:  # JSON has integers of any size
        return False


def _are_segments(cell: Any) -> bool:
    return _INTEGERS(cell) and (len(cell) == 0 or (cell[0] == 0 and bool(np.isin(np.diff(cell), (0, 1)).all())))


_INTEGERS = holds("iu")
ANYTHING = Kind("anything", lambda cell: True)
TEXT = Kind("a text", lambda cell: isinstance(cell, str))
TEXTS = Kind("a list of texts", _are_texts)
INTEGER = Kind("an integer", lambda cell: isinstance(cell, Integral))
NUMBER = Kind("a number", _is_number)
NUMBERS = Kind("a list of numbers", holds("fiu"))
SEGMENTS = Kind("a list of segment numbers that begins at 0 and rises by 1 or by nothing", _are_segments)
REWARD = Kind("a number or empty", NUMBER.fits, optional=True)

TOKEN_COLUMNS = {
    "tokens": TEXTS,
    "segment_ids": SEGMENTS,
    **dict.fromkeys(("logps", "entropies", "values", "advantages", "returns"), NUMBERS),
}
VALUE_COLUMNS = {
    **dict.fromkeys(("response", "segment"), INTEGER),
    **dict.fromkeys(("value", "monte_carlo_value", "standard_error"), NUMBER),
}


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
        kinds = {name: TOKEN_COLUMNS.get(name, NUMBERS) for name in columns}
        frame, notes = read_frame(path, {"step": INTEGER, "reward": REWARD, **kinds})
        _log(notes)
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
    frames = [
        read_frame(path, VALUE_COLUMNS)[0][list(VALUE_COLUMNS)].assign(step=step, process=process)
        for path, step, process in recorded_files(Path(folder), "values", ("parquet",), "ValueDiagnostics")
    ]
    return pd.concat(frames, ignore_index=True)[["step", "process", *VALUE_COLUMNS]]


def read_log_history(path: str | Path) -> pd.DataFrame:
    """
    Read a run's log. A last line that is cut, as by a run that was killed, is left out with a warning.

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
    log, notes = read_log(Path(path))
    _log(notes)
    return log


def read_log(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """[`read_log_history`], with notes instead of warnings."""
    if path.is_dir():
        path = _log_file(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file or folder.")
    notes: list[str] = []
    if path.suffix == ".jsonl":
        entries, notes = read_json_lines(path)
    else:
        content = read_json(path)
        if not isinstance(content, dict) or "log_history" not in content:
            raise ValueError(f"{path}: no `log_history` in it; a `trainer_state.json` or a `.jsonl` is read.")
        entries = content["log_history"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: the log must have at least one entry, each an object of names and numbers.")
    log = _as_frame(path, entries)
    if "step" in log:
        _check_column(path, log["step"], REWARD)
        log["step"] = pd.to_numeric(log["step"])  # of cells that are all empty, pandas would make objects
    return log, notes


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


def read_frame(path: Path, columns: Mapping[str, Kind]) -> tuple[pd.DataFrame, list[str]]:
    """
    Read a recorded file.

    Args:
        path (`Path`): a Parquet file, or one with a JSON object on each line.
        columns (`Mapping[str, Kind]`): its columns; optional ones may be missing.

    Returns:
        `tuple[pd.DataFrame, list[str]]`: all of its columns, and notes on lines that are left out.

    Raises:
        ValueError: if it is damaged, lacks a column, or has cells of another kind.
    """
    notes: list[str] = []
    if path.suffix == ".parquet":
        try:
            frame = pd.read_parquet(path)
        except (ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]}).") from error
    else:
        rows, notes = read_json_lines(path)
        if not rows:
            raise ValueError(f"{path}: there is no whole line in it, as after a run that was killed; delete the file.")
        frame = _as_frame(path, rows)
    for name, kind in columns.items():
        if name in frame:
            _check_column(path, frame[name], kind)
        elif not kind.optional:
            raise ValueError(f"{path}: column `{name}` is missing; it has {sorted(frame.columns)}.")
    return frame, notes


def _as_frame(path: Path, rows: list[dict[str, Any]]) -> pd.DataFrame:
    try:
        return pd.DataFrame(rows)
    except (ValueError, TypeError, OverflowError) as error:  # such as half a character
        raise ValueError(f"{path}: its lines are no table ({error}).") from error


def _check_column(path: Path, column: pd.Series, kind: Kind) -> None:
    for place, cell in enumerate(column):
        # pandas fills cells that a row lacks with NaN.
        if not kind.fits(cell) and not (kind.optional and pd.api.types.is_scalar(cell) and pd.isna(cell)):
            raise ValueError(f"{path}, row {place}: `{column.name}` must be {kind.words}, got {str(cell)[:60]!r}.")


def _log(notes: list[str]) -> None:
    for note in notes:
        logger.warning(note)


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
