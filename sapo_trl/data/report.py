"""The report on a data set's cleaning: rows kept, rows left out, pictures resized."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ..files import write_text


_ROWS_SHOWN = 8


@dataclass
class CleaningReport:
    """
    Counts of one pass over a data set. `print` of [rich](https://rich.readthedocs.io) shows it as a table.

    Args:
        name (`str`): name of the rows, such as `"train"`.
        rows (`int`): number of rows read.
        bad (`dict[str, list[int]]`): for each reason, the numbers of the rows left out, counted from 0.
        examples (`dict[str, str]`): for each reason, the fault of its first row.
        images (`int`): number of pictures in the kept rows.
        resized (`int`): number of resized pictures.
        largest_before (`tuple[int, int]`): width and height of the picture with most pixels before resizing.
        largest_after (`tuple[int, int]`): width and height of the picture with most pixels after resizing.
    """

    name: str = "data"
    rows: int = 0
    bad: dict[str, list[int]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    images: int = 0
    resized: int = 0
    largest_before: tuple[int, int] = (0, 0)
    largest_after: tuple[int, int] = (0, 0)

    @property
    def kept(self) -> int:
        """Number of rows kept for training."""
        return self.rows - sum(map(len, self.bad.values()))

    def add_good(self, sizes: Iterable[Iterable[int]]) -> None:
        """Count a kept row. `sizes` has four numbers per picture: width and height before and after resizing."""
        self.rows += 1
        for width, height, new_width, new_height in sizes:
            self.images += 1
            self.resized += (width, height) != (new_width, new_height)
            self.largest_before = max(self.largest_before, (width, height), key=_pixels)
            self.largest_after = max(self.largest_after, (new_width, new_height), key=_pixels)

    def add_bad(self, row: int, reason: str, detail: str) -> None:
        """Count a row that is left out."""
        self.rows += 1
        self.bad.setdefault(reason, []).append(row)
        self.examples.setdefault(reason, f"row {row}: {detail}")

    def clear(self) -> None:
        """Start anew, as each pass over a stream does."""
        vars(self).update(vars(CleaningReport(self.name)))

    def summary(self) -> str:
        """The bad rows in one line: each reason with its rows."""
        return "; ".join(f"{reason}: {_numbers(rows)}" for reason, rows in self.bad.items()) or "none"

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {**vars(self), "kept": self.kept}

    def __rich__(self) -> Table:
        table = Table(title=f"{self.name}: {self.kept:,} of {self.rows:,} rows", title_justify="left")
        for heading in ("left out", "rows", "which", "the first"):
            table.add_column(heading)
        for reason, rows in self.bad.items():
            table.add_row(reason, f"{len(rows):,}", _numbers(rows), self.examples[reason])
        if not self.bad:
            table.add_row("nothing", "0", "", "")
        if self.images:
            before, after = ("×".join(map(str, size)) for size in (self.largest_before, self.largest_after))
            table.caption = f"{self.images:,} pictures, {self.resized:,} resized; the largest {before}, then {after}"
        return table


def save_reports(reports: Iterable[CleaningReport], path: str | Path) -> None:
    """Write reports to a JSON file, by their names."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({report.name: report.to_dict() for report in reports}, indent=2) + "\n")


def _pixels(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _numbers(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:_ROWS_SHOWN]))
    return shown if len(rows) <= _ROWS_SHOWN else f"{shown}, … ({len(rows):,} rows)"
