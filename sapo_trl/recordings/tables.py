"""Finds recorded files, and reads one as a table whose cells are checked. Errors name the file and its fault."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow import ArrowException

from ..json_files import read_json_lines
from .columns import Kind


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
        command = " (on the command line: `--record_every 1`)" if kind == "segments" else ""
        raise ValueError(
            f"{folder}: no file {patterns} in it; `{writer}(output_dir=…)`{command} writes them during training."
        )
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
        frame = as_frame(path, rows)
    for name, kind in columns.items():
        if name in frame:
            check_column(path, frame[name], kind)
        elif not kind.optional:
            raise ValueError(f"{path}: column `{name}` is missing; it has {sorted(frame.columns)}.")
    return frame, notes


def as_frame(path: Path, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table; an error names the file that they are from."""
    try:
        return pd.DataFrame(rows)
    except (ValueError, TypeError, OverflowError) as error:  # such as half a character
        raise ValueError(f"{path}: its lines are no table ({error}).") from error


def check_column(path: Path, column: pd.Series, kind: Kind) -> None:
    """Raise unless every cell of a column is of its kind."""
    for place, cell in enumerate(column):
        # pandas fills cells that a row lacks with NaN.
        if not kind.fits(cell) and not (kind.optional and pd.api.types.is_scalar(cell) and pd.isna(cell)):
            raise ValueError(f"{path}, row {place}: `{column.name}` must be {kind.words}, got {str(cell)[:60]!r}.")
