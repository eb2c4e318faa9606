"""Stores a run's generations in parquet files. A file is complete or missing, and no row is lost or repeated."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..files import replacing
from .benchmark import Problem


PROBLEMS = pa.schema(
    {
        "benchmark": pa.string(),
        "row": pa.int64(),
        "id": pa.string(),
        "prompt": pa.string(),  # JSON
        "answer": pa.string(),
        "fields": pa.string(),  # JSON
        "thumbnails": pa.list_(pa.large_binary()),  # WebP
    }
)
GENERATIONS = pa.schema(
    {
        "benchmark": pa.string(),
        "row": pa.int64(),
        "id": pa.string(),
        "generation": pa.int64(),
        "seed": pa.int64(),
        "text": pa.large_string(),
        "tokens": pa.int64(),
        "finish_reason": pa.string(),
    }
)

MERGE_AT = 64
"""Number of one-batch files that are merged into one file. Otherwise a long run would have thousands of files."""
THUMBNAIL_SIDE = 384
"""Pixels of the longer side of the page's pictures."""

_PART = re.compile(r"part-(\d{6})-(\d{6})\.parquet")
_UNFINISHED = re.compile(rf"\.{_PART.pattern}\.\d+")


class PartFiles:
    """
    Rows in a folder of parquet files. Rows are only ever added.

    `append` writes a file under another name, flushes it to the disk and renames it. So a killed process leaves the
    rows of whole calls. Files are merged now and then. The name of a merged file has the numbers of its parts. If a
    kill leaves parts that a merged file covers, these parts do not count.

    Args:
        folder (`Path`): the folder. It is created if necessary.
        schema (`pa.Schema`): schema of the rows.
    """

    def __init__(self, folder: Path, schema: pa.Schema):
        self.folder = folder
        self.schema = schema
        folder.mkdir(parents=True, exist_ok=True)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows, all of them or none."""
        if not rows:
            return
        parts = self._parts()
        number = parts[-1][1] + 1 if parts else 0
        self._write(number, number, pa.Table.from_pylist(list(rows), self.schema))
        singles = [part for part in self._parts() if part[0] == part[1]]
        if len(singles) >= MERGE_AT:
            # Do not merge the merged files again, or a long run would write its beginning over and over.
            self._merge(singles)

    def merge(self) -> None:
        """Merge all files into one."""
        self._merge(self._parts())

    def _merge(self, parts: Sequence[tuple[int, int, Path]]) -> None:
        if len(parts) > 1:
            self._write(parts[0][0], parts[-1][1], pa.concat_tables([self._read(path) for _, _, path in parts]))
            self.tidy()

    def tidy(self) -> None:
        """Remove the remains of a killed process: covered parts and unfinished files."""
        valid = {path for _, _, path in self._parts()}
        for path in self.folder.iterdir():
            # Remove no other hidden files: the folder may come from someone else and link to another place.
            if path not in valid and (_PART.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name)):
                path.unlink()

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """All rows, in the order of their addition. Raises `ValueError` for a damaged file."""
        tables = [self._read(path, columns) for _, _, path in self._parts()]
        return pa.concat_tables(tables) if tables else self.schema.empty_table().select(columns or self.schema.names)

    def _parts(self) -> list[tuple[int, int, Path]]:
        """First number, last number and path of the valid files, in order."""
        found = []
        for path in self.folder.iterdir():
            match = _PART.fullmatch(path.name)
            if match:
                found.append((int(match[1]), int(match[2]), path))
        # Sort wide parts before narrow ones, so that a part comes after its merged file.
        found.sort(key=lambda part: (part[0], -part[1]))
        parts: list[tuple[int, int, Path]] = []
        for part in found:
            if not parts or part[0] > parts[-1][1]:
                parts.append(part)
        return parts

    def _read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        return read_table(path, self.schema if columns is None else pa.schema([self.schema.field(c) for c in columns]))

    def _write(self, first: int, last: int, table: pa.Table) -> None:
        with replacing(self.folder / f"part-{first:06d}-{last:06d}.parquet") as temporary:
            pq.write_table(table, temporary)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """The columns of `schema` from a parquet file. Raises `ValueError` if the file is damaged or has other columns."""
    try:
        return pq.read_table(path, columns=schema.names).select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, LookupError) as error:
        raise ValueError(f"{path}: not a file of this version, or damaged ({str(error).splitlines()[0]}).") from error


class GenerationStore:
    """
    The problems and generations in a run folder.

    Problems are stored with the model's prompt, the scorer's fields and small pictures. So scores, tables and pages
    need neither the data set nor the model again.

    Args:
        folder (`Path`): the run folder.
    """

    def __init__(self, folder: Path):
        self.problem_files = PartFiles(folder / "problems", PROBLEMS)
        self.generation_files = PartFiles(folder / "generations", GENERATIONS)
        for files in (self.problem_files, self.generation_files):
            files.tidy()
        known = self.problem_files.table(["benchmark", "id", "row"])
        self._row_of = {(row["benchmark"], row["id"]): row["row"] for row in known.to_pylist()}
        keys = self.generation_files.table(["benchmark", "row", "generation"])
        self.done = {(row["benchmark"], row["row"], row["generation"]) for row in keys.to_pylist()}

    def add(
        self, benchmark: str, problems: Iterable[tuple[int, Problem]], generations: Sequence[dict[str, Any]]
    ) -> None:
        """
        Store a batch.

        Args:
            benchmark (`str`): name of the benchmark.
            problems (`Iterable[tuple[int, Problem]]`): row number and problem of each problem in the batch.
            generations (`Sequence[dict]`): rows of [`GENERATIONS`], without `benchmark`.

        Raises:
            ValueError: if two rows of the benchmark have the same id.
        """
        new: dict[str, dict[str, Any]] = {}
        for row, problem in problems:
            known = self._row_of.get((benchmark, problem.id), new.get(problem.id, {}).get("row"))
            if known is None:
                new[problem.id] = _problem_row(benchmark, row, problem)
            elif known != row:
                raise ValueError(f"{benchmark}: rows {known} and {row} have the same id {problem.id!r}.")
        # Store the problems first. A problem without generations does no harm, but a generation needs its problem.
        self.problem_files.append(list(new.values()))
        self._row_of.update({(benchmark, problem_id): entry["row"] for problem_id, entry in new.items()})
        self.generation_files.append([{"benchmark": benchmark, **generation} for generation in generations])
        self.done.update((benchmark, entry["row"], entry["generation"]) for entry in generations)

    def merge(self) -> None:
        """Merge all files of problems into one, and all files of generations."""
        self.problem_files.merge()
        self.generation_files.merge()

    def problems(self) -> list[dict[str, Any]]:
        """The problems: rows of [`PROBLEMS`], sorted by benchmark and row."""
        return self.problem_files.table().sort_by([("benchmark", "ascending"), ("row", "ascending")]).to_pylist()

    def generations(self, columns: list[str] | None = None) -> list[dict[str, Any]]:
        """The generations: rows of [`GENERATIONS`] or some of its columns, sorted by benchmark, row and number."""
        key = ["benchmark", "row", "generation"]
        table = self.generation_files.table(columns and [*key, *columns])
        return table.sort_by([(name, "ascending") for name in key]).to_pylist()


def stored_problem(row: dict[str, Any]) -> Problem:
    """A problem from its row of [`PROBLEMS`], without its images. Raises `ValueError` if the row has no JSON."""
    try:
        prompt, fields = json.loads(row["prompt"]), json.loads(row["fields"])
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"problems: {row['benchmark']} {row['id']!r} has no JSON in its row ({error}).") from error
    return Problem(id=row["id"], prompt=prompt, answer=row["answer"], fields=fields)


def _problem_row(benchmark: str, row: int, problem: Problem) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "row": row,
        "id": problem.id,
        "prompt": json.dumps(problem.prompt, ensure_ascii=False),
        "answer": problem.answer,
        "fields": json.dumps(problem.fields, ensure_ascii=False),
        "thumbnails": [_thumbnail(image) for image in problem.images],
    }


def _thumbnail(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=75)
    return buffer.getvalue()
