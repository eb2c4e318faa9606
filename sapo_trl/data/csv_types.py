"""
Types of a CSV file's columns that keep every cell's text.

By default, pandas reads `007` as 7, and `NA` and `None` as missing.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import pandas as pd
from datasets import Features, Value


# Whole numbers that give the same text when they are written again.
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,14}")
_ROWS_AT_ONCE = 50_000


def csv_options(files: Iterable[str], sep: str = ",") -> dict[str, Any]:
    """
    Options for `load_dataset` to read tables.

    Args:
        files (`Iterable[str]`): tables with the same columns.
        sep (`str`, *optional*, defaults to `","`): separator of the cells.

    Returns:
        `dict`: arguments of [`~datasets.load_dataset`]. A column has numbers (or `True` and `False`) if reading and
        writing its cells gives the same texts; otherwise it has texts. Only an empty cell is missing.

    Raises:
        ValueError: if a file is not a table.
    """
    kinds: dict[str, set[str]] = {}
    for file in files:
        try:
            for cells in pd.read_csv(file, sep=sep, dtype=str, keep_default_na=False, chunksize=_ROWS_AT_ONCE):
                for column in cells:
                    kinds[column] = kinds.get(column, {"int64", "float64", "bool"}) & _kinds(cells[column].unique())
        except ValueError as error:  # pandas raises it also for an empty file and for rows of unequal length
            raise ValueError(f"{file!r} is no table of cells between {sep!r}: {error}") from error
    features = {
        str(column): Value(next((kind for kind in ("int64", "bool", "float64") if kind in possible), "string"))
        for column, possible in kinds.items()
    }
    return {"sep": sep, "features": Features(features), "keep_default_na": False, "na_values": [""]}


def _kinds(cells: Iterable[str]) -> set[str]:
    """The types that fit some cells of a column. Only columns of floats or texts can have missing cells."""
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
