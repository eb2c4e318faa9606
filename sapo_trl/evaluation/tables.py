"""Tables of runs together with the paper's rows, for Markdown, LaTeX, JSON and a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from ..files import write_json, write_text
from ..foreign_text import escape_markdown, visible
from ..json_files import NUMBER, Each, check_shape, read_json
from ..names import markdown_table
from .published import (
    GENERAL_AVERAGES,
    GENERAL_COLUMNS,
    MAIN,
    MAIN_AVERAGES,
    MAIN_COLUMNS,
    METRICS,
    PAPER,
    TEXT_COLUMNS,
    size_of,
)
from .results import RESULTS_NAME


TITLES = {
    "geo3k": "Geo3K",
    "logicvista": "LogicVista",
    "mathverse": "MathVerse",
    "wemath": "WeMath",
    "mathvista": "MathVista",
    "dynamath": "DynaMath",
    "scienceqa": "ScienceQA",
    "mmmu": "MMMU",
    "mmbench": "MMBench",
    "mmstar": "MMStar",
    "gsm8k": "GSM8K",
    "math500": "MATH500",
}


_INTERVAL = {"value": NUMBER, "low": (type(None), *NUMBER), "high": (type(None), *NUMBER)}
_RESULTS = {
    "name": str,
    "model": str,
    "benchmarks": Each(
        {
            **dict.fromkeys(("title", "headline", "scoring_note"), str),
            **dict.fromkeys(("problems", "belonging", "n", "errors"), int),
            "metrics": Each(_INTERVAL),
            "scorers": dict,
        }
    ),
}
"""Fields of a `results.json` for tables."""

PART = "†"
"""Marks numbers from a part of a benchmark (`limit`, or an unfinished run)."""


@dataclass(frozen=True)
class Cell:
    """
    A number of a table, in percent.

    Args:
        value (`float`): the number.
        low (`float`, *optional*): lower end of its 95 % interval.
        high (`float`, *optional*): upper end.
        mark (`str`, *optional*): [`PART`] for a number from a part of the benchmark.
    """

    value: float
    low: float | None = None
    high: float | None = None
    mark: str = ""

    def __str__(self) -> str:
        interval = self.interval
        return f"{self.value:.2f}{self.mark}" + (f" ({interval})" if interval else "")

    @property
    def interval(self) -> str:
        """The interval as text; empty without an interval."""
        return "" if self.low is None or self.high is None else f"{self.low:.1f} to {self.high:.1f}"


@dataclass(frozen=True)
class Row:
    """
    A line of a table.

    Args:
        name (`str`): the run's model, or the paper's algorithm.
        scorer (`str`): name of the scorer.
        cells (`list[Cell | None]`): one for each column.
    """

    name: str
    scorer: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class ResultTable:
    """
    A table of the paper's layout.

    Args:
        title (`str`): title above the table.
        columns (`list[str]`): titles of the benchmarks, and `Avg` if there is an average.
        rows (`list[Row]`): the paper's rows first, then the runs.
        notes (`list[str]`): notes below the table.
    """

    title: str
    columns: list[str]
    rows: list[Row]
    notes: list[str]

    @property
    def frame(self) -> pd.DataFrame:
        """The table as texts. A missing number is empty."""
        lines = [
            [row.name, row.scorer, *["" if cell is None else str(cell) for cell in row.cells]] for row in self.rows
        ]
        return pd.DataFrame(lines, columns=["", "scored by", *self.columns])


def make_tables(runs: Sequence[Mapping[str, Any]]) -> list[ResultTable]:
    """
    Make the tables of some runs.

    Args:
        runs (`Sequence[Mapping]`): contents of `results.json` files.

    Returns:
        `list[ResultTable]`: multi-modal reasoning, general, text, others. A table without a run's number is left out.
    """
    sizes = sorted({size for run in runs if (size := size_of(run["model"]))}) or list(MAIN)
    layouts = {
        "Multi-modal reasoning": (MAIN_COLUMNS, True, _main_rows(sizes)),
        "General": (GENERAL_COLUMNS, True, _general_rows(sizes)),
        "Text": (TEXT_COLUMNS, False, []),
    }
    laid_out = {name for columns, _, _ in layouts.values() for name in columns}
    others = dict.fromkeys(name for run in runs for name in run["benchmarks"] if name not in laid_out)
    if others:
        layouts["Others"] = (tuple(others), False, [])
    tables = []
    for title, (names, has_average, published) in layouts.items():
        rows = [row for run in runs if any((row := _run_row(run, names, has_average)).cells)]
        if rows:
            columns = [_column_title(name, runs) for name in names] + ["Avg"] * has_average
            tables.append(ResultTable(title, columns, [*published, *rows], _notes(runs, names, bool(published))))
    return tables


def as_markdown(tables: Sequence[ResultTable]) -> str:
    """Tables with their titles and notes."""
    texts = []
    for table in tables:
        frame = table.frame.map(escape_markdown)
        frame.columns = [escape_markdown(name) for name in frame.columns]
        notes = "\n".join(f"- {escape_markdown(note)}" for note in table.notes)
        texts.append(f"## {table.title}\n\n{markdown_table(frame)}\n\n{notes}\n")
    return "\n".join(texts)


def as_latex(tables: Sequence[ResultTable]) -> str:
    """Tables as LaTeX `tabular`s in the style of booktabs."""
    texts = []
    for table in tables:
        layout = "ll" + "r" * len(table.columns)
        tabular = table.frame.to_latex(index=False, escape=True, column_format=layout)
        notes = "".join(f"% {' '.join(note.split())}\n" for note in table.notes)
        texts.append(f"% {table.title}\n{notes}{tabular}")
    return "\n".join(texts)


def as_json(tables: Sequence[ResultTable]) -> list[dict[str, Any]]:
    """Tables as JSON values, with unrounded numbers."""
    return [asdict(table) for table in tables]


def as_rich(table: ResultTable, width: int | None = None) -> Group:
    """
    A table for a terminal, with each interval below its number.

    Args:
        table ([`ResultTable`]): the table.
        width (`int`, *optional*):
            characters of a line. A wider table is continued below, so that no name is split. Names that leave no
            room for a number stand below the table. By default there is no limit.
    """
    width = width or sys.maxsize
    needed = [
        _widest([title, *(line for row in table.rows if (cell := row.cells[column]) for line in _lines(cell))])
        for column, title in enumerate(table.columns)
    ]
    legend: list[Text] = []
    if _taken(table) + max(needed) > width:
        table, legend = _numbered(table)
    parts: list[list[int]] = [[]]
    left = width - _taken(table)
    for column, own in enumerate(needed):
        if own > left and parts[-1]:
            parts.append([])
            left = width - _taken(table)
        parts[-1].append(column)
        left -= own
    shown = (_part(table, columns, table.title if columns is parts[0] else None) for columns in parts)
    return Group(*shown, *legend)


def _taken(table: ResultTable) -> int:
    """Characters of the columns with names and scorers."""
    return _widest(["", *(row.name for row in table.rows)]) + _widest(
        ["scored by", *(row.scorer for row in table.rows)]
    )


def _widest(texts: Sequence[str]) -> int:
    """Characters of a column, with the two behind it. Chinese characters take two each."""
    return max(map(cell_len, texts)) + 2


def _numbered(table: ResultTable) -> tuple[ResultTable, list[Text]]:
    """The table with numbers in place of the runs' names and scorers, and lines that explain the numbers."""
    rows: list[Row] = []
    legend: list[Text] = []
    for row in table.rows:
        if row.scorer == PAPER:
            rows.append(row)
            continue
        mark = f"[{len(legend) + 1}]"
        rows.append(replace(row, name=mark, scorer=""))
        legend.append(Text(f"{mark} {row.name}\n{'':<{len(mark)}} scored by {row.scorer}"))
    return replace(table, rows=rows), legend


def _part(table: ResultTable, columns: Sequence[int], title: str | None) -> RichTable:
    """Some of a table's columns."""
    shown = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, name in enumerate(["", "scored by", *(table.columns[column] for column in columns)]):
        shown.add_column(Text(name), justify="left" if index < 2 else "right", overflow="fold")
    for row, following in zip(table.rows, [*table.rows[1:], None], strict=True):
        cells = [row.cells[column] for column in columns]
        texts = [Text("" if cell is None else "\n".join(_lines(cell))) for cell in cells]
        is_last_published = row.scorer == PAPER and following is not None and following.scorer != PAPER
        style = "dim" if row.scorer == PAPER else ""
        shown.add_row(Text(row.name), Text(row.scorer), *texts, style=style, end_section=is_last_published)
    return shown


def _lines(cell: Cell) -> list[str]:
    """The number, and its interval if there is one."""
    return [f"{cell.value:.2f}{cell.mark}", *filter(None, [cell.interval])]


def write_tables(folder: Path, tables: Sequence[ResultTable]) -> list[Path]:
    """Write `table.md`, `table.tex` and `table.json` to a folder; returns their paths."""
    paths = [folder / f"table.{ending}" for ending in ("md", "tex", "json")]
    write_text(paths[0], as_markdown(tables))
    write_text(paths[1], as_latex(tables))
    write_json(paths[2], as_json(tables))
    return paths


def read_results(folder: Path) -> dict[str, Any]:
    """A run folder's results. Raises `ValueError` if the file is missing, old or damaged."""
    path = folder / RESULTS_NAME
    if not path.is_file():
        raise ValueError(
            f"{str(folder)!r} has no {RESULTS_NAME}: it is not a run folder of `sapo-trl eval`, or is unfinished."
        )
    results = read_json(path, _RESULTS)
    for name, entry in results["benchmarks"].items():
        check_shape(entry["metrics"], {entry["headline"]: dict}, str(path), f"benchmarks.{name}.metrics")
        if entry["n"] > 1:
            check_shape(entry, {"repeated": Each(_INTERVAL)}, str(path), f"benchmarks.{name}")
    return results


def _run_row(run: Mapping[str, Any], names: Sequence[str], has_average: bool) -> Row:
    cells = [_cell(run["benchmarks"].get(name)) for name in names]
    if has_average:
        whole = all(cells)
        mark = PART if any(cell.mark for cell in cells if cell) else ""
        cells.append(Cell(sum(cell.value for cell in cells) / len(cells), mark=mark) if whole else None)
    scorers = {scorer for name in names for scorer in run["benchmarks"].get(name, {}).get("scorers", ())}
    # The rules decide first, and a judge after them.
    ordered = sorted(scorers, key=lambda scorer: (scorer != "rules", scorer))
    return Row(visible(run["name"]), visible(", then ".join(ordered)), cells)


def _cell(benchmark: Mapping[str, Any] | None) -> Cell | None:
    if benchmark is None:
        return None
    return _cell_of(benchmark["metrics"][benchmark["headline"]], PART if _is_part(benchmark) else "")


def _cell_of(interval: Mapping[str, Any], mark: str = "") -> Cell:
    ends = [None if interval[end] is None else 100 * interval[end] for end in ("low", "high")]
    return Cell(100 * interval["value"], *ends, mark=mark)


def _is_part(benchmark: Mapping[str, Any]) -> bool:
    return benchmark["problems"] < benchmark["belonging"]


def _main_rows(sizes: Sequence[str]) -> list[Row]:
    return [
        Row(_published_name(name, size), PAPER, [Cell(value) for value in (*values, MAIN_AVERAGES[size][name])])
        for size in sizes
        for name, values in MAIN[size].items()
    ]


def _general_rows(sizes: Sequence[str]) -> list[Row]:
    return [
        Row(_published_name(name, size), PAPER, [*[None] * len(GENERAL_COLUMNS), Cell(value)])
        for size in sizes
        for name, value in GENERAL_AVERAGES.get(size, {}).items()
    ]


def _published_name(name: str, size: str) -> str:
    return name if size in name else f"{name}, {size}"


def _column_title(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    titles = [run["benchmarks"][name]["title"] for run in runs if name in run["benchmarks"]]
    return TITLES.get(name) or visible(titles[0])


def _notes(runs: Sequence[Mapping[str, Any]], names: Sequence[str], has_published: bool) -> list[str]:
    notes = [
        "Percentages, with 95 % intervals over problems or groups of problems in parentheses (bootstrap; exact where "
        "all scores are 0, or all 1)."
    ]
    found = {name: run["benchmarks"][name] for run in runs for name in names if name in run["benchmarks"]}
    metrics = "; ".join(f"{entry['title']} {_metric(entry)}" for entry in found.values())
    notes.append(f"Metrics: {metrics}.")
    if has_published:
        metrics = "; ".join(f"{TITLES[name]} {METRICS[name]}" for name in names)
        notes.append(
            f"The paper's rows are single runs without intervals. It does not name its scorer. Metrics: {metrics}."
        )
    for run in runs:
        for name in names:
            entry = run["benchmarks"].get(name)
            if entry is None:
                continue
            if _is_part(entry):
                notes.append(
                    f"{PART} {run['name']}, {entry['title']}: {entry['problems']} of {entry['belonging']} problems."
                )
            if entry["n"] > 1:
                repeated = ", ".join(
                    f"{metric} {_cell_of(interval)}" for metric, interval in entry["repeated"].items()
                )
                notes.append(f"{run['name']}, {entry['title']}: {repeated}.")
            others = {name: value for name, value in entry["metrics"].items() if name.startswith("rewards/")}
            if len(others) > 1:
                means = ", ".join(f"{metric} {_cell_of(interval)}" for metric, interval in others.items())
                notes.append(f"{run['name']}, {entry['title']}: {means}.")
            if entry["errors"]:
                notes.append(f"{run['name']}, {entry['title']}: {entry['errors']} answers could not be scored.")
    notes += [f"{entry['title']}: {entry['scoring_note']}" for entry in found.values() if entry["scoring_note"]]
    return [visible(note) for note in notes]


def _metric(entry: Mapping[str, Any]) -> str:
    repeats = f", mean of {entry['n']} generations" if entry["n"] > 1 else ""
    return entry["headline"].replace("_", " ") + repeats
