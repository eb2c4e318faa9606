"""Types of a CSV file's columns, so that no cell changes: pandas makes 7 of `007`, and nothing of `NA` and `None`."""

import math
import re
from collections.abc import Iterable
from typing import Any

import pandas as pd
from datasets import Features, Value


# Numbers that are the same text when they are written out again.
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,14}")
_ROWS_AT_ONCE = 50_000


def csv_options(files: Iterable[str], sep: str = ",") -> dict[str, Any]:
    """
    How `load_dataset` has to read tables.

    Args:
        files (`Iterable[str]`): tables with the same columns.
        sep (`str`, *optional*, defaults to `","`): what separates their cells.

    Returns:
        `dict`: arguments of [`~datasets.load_dataset`]: a column is numbers (or `True` and `False`) if each of its
        cells is one and is still the same text after it has been read; text otherwise. Only an empty cell is missing.

    Raises:
        ValueError: if a file is no table.
    """
    kinds: dict[str, set[str]] = {}
    for file in files:
        try:
            for cells in pd.read_csv(file, sep=sep, dtype=str, keep_default_na=False, chunksize=_ROWS_AT_ONCE):
                for column in cells:
                    kinds[column] = kinds.get(column, {"int64", "float64", "bool"}) & _kinds(cells[column].unique())
        except ValueError as error:  # of pandas, among them those for an empty file and for rows of unequal length
            raise ValueError(f"{file!r} is no table of cells between {sep!r}: {error}") from error
    features = {
        str(column): Value(next((kind for kind in ("int64", "bool", "float64") if kind in possible), "string"))
        for column, possible in kinds.items()
    }
    return {"sep": sep, "features": Features(features), "keep_default_na": False, "na_values": [""]}


def _kinds(cells: Iterable[str]) -> set[str]:
    """What a column may be, by some of its cells. Only floats and texts can be missing."""
    cells = set(cells)
    filled = cells - {""}
    if not filled:
        return {"float64"}
    if all(map(_WHOLE.fullmatch, filled)):
        return {"float64"} if "" in cells else {"int64", "float64"}
    if all(_WHOLE.fullmatch(cell) or _is_exact(cell) for cell in filled):
        return {"float64"}
    return {"bool"} if cells <= {"True", "False"} else set()


def _is_exact(cell: str) -> bool:
    try:
        return "e" not in cell and cell != "-0.0" and math.isfinite(float(cell)) and str(float(cell)) == cell
    except ValueError:
        return False
