"""Texts for people: the name that a user meant, and tables in Markdown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import pandas as pd


def nearest_name(name: str, known: Iterable[str]) -> str:
    """
    ` Did you mean ...?` for a mistyped name, to append to an error; empty if no known name is similar.

    A name with the same letters in another order comes first. `lr` is read as `learning_rate`, because it has too few
    letters to be similar.
    """
    known = list(known)
    spelled_out = "_".join("learning_rate" if part == "lr" else part for part in name.split("_"))
    swapped = [other for other in known if sorted(other) == sorted(name)]
    similar = swapped or difflib.get_close_matches(spelled_out, known, n=1)
    return f" Did you mean `{similar[0]}`?" if similar else ""


def markdown_table(table: pd.DataFrame) -> str:
    """A table of texts and numbers, with its column names as header; missing entries stay empty."""
    header = [str(name) for name in table.columns]
    cells = zip(table.to_numpy(dtype=object), table.isna().to_numpy(), strict=True)
    rows = [["" if empty else str(value) for value, empty in zip(*row, strict=True)] for row in cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
