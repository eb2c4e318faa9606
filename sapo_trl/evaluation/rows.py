"""A benchmark's rows, from the hub or from local files, as problems."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, get_dataset_split_names, load_dataset

from ..data.images import ImageLimits
from ..data.loading import BUILDERS, file_arguments, undecoded
from .benchmark import Benchmark, Problem


# Columns in which data sets have the names of their rows.
_ID_COLUMNS = ("id", "pid", "unique_id", "sample_index", "index", "ID")
_FAULTS_SHOWN = 5
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Rows:
    """
    The rows of a benchmark.

    Args:
        benchmark ([`Benchmark`]): what they are of.
        dataset ([`~datasets.Dataset`]): all rows of its split.
        numbers (`list[int]`): those that belong to the benchmark, up to the limit.
        belonging (`int`): how many belong to it without the limit.
        fingerprint (`str`): of the content of `numbers`, whatever file they come from.
        source (`str`): hub id or path.
        limits ([`~sapo_trl.data.images.ImageLimits`]): pixels that images are scaled to.
        folder (`Path`, *optional*): where paths of images start, of rows in local files.
    """

    benchmark: Benchmark
    dataset: Dataset
    numbers: list[int]
    belonging: int
    fingerprint: str
    source: str
    limits: ImageLimits
    folder: Path | None = None

    def problem(self, number: int) -> Problem:
        """The problem in a row. Raises `ValueError` with the row's number and id if it cannot be made."""
        row = self.dataset[number]
        try:
            problem = self.benchmark.to_problem(_with_files(row, self.folder), number)
            images = [self.limits.resized(image) for image in problem.images]
        except Exception as error:  # of any kind: rows come from files that nobody here has written
            raise ValueError(
                f"{self.benchmark.name}: row {number} of {self.source!r}{_named(row)} is no problem of this benchmark "
                f"({type(error).__name__}: {error})."
            ) from error
        return replace(problem, images=images)

    def check(self, numbers: Iterable[int], advance: Callable[[], None] = lambda: None) -> None:
        """
        Read rows, images included, and have each scored with its own answer.

        Args:
            numbers (`Iterable[int]`): of the rows.
            advance (`Callable`, *optional*): called after each.

        Raises:
            ValueError: with all rows that are no problem, or whose answer the scorer does not take for right.
        """
        faults = []
        for number in numbers:
            try:
                fault = self._fault(self.problem(number))
            except ValueError as error:
                fault = str(error)
            if fault is not None:
                faults.append(fault)
            advance()
        if faults:
            more = f" And {len(faults) - _FAULTS_SHOWN} more." if len(faults) > _FAULTS_SHOWN else ""
            raise ValueError(
                f"{self.benchmark.name} has rows that cannot be used: {len(faults)}. Nothing was generated. Mend "
                f"them, or leave them out of a local copy. {' '.join(faults[:_FAULTS_SHOWN])}{more}"
            )

    def _fault(self, problem: Problem) -> str | None:
        """Why the problem's own answer does not count as right; `None` if it does."""
        name, answer = f"{self.benchmark.name}: the problem {problem.id!r} of {self.source!r}", problem.answer
        if not answer.strip():
            return f"{name} has no answer, got {answer!r}."
        right = self.benchmark.right_answer(problem)
        try:
            score = self.benchmark.score(problem, rf"\boxed{{{right}}}")
        except Exception as error:  # a scorer that cannot read its gold must say so now
            return f"{name} has the answer {answer!r}, which cannot be scored ({type(error).__name__}: {error})."
        return None if score.correct == 1.0 else f"{name} has the answer {answer!r}, for which {right!r} is not right."


def load_rows(
    benchmark: Benchmark,
    path: str | None = None,
    *,
    limit: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Rows:
    """
    Read a benchmark's rows.

    Args:
        benchmark ([`Benchmark`]): the benchmark.
        path (`str`, *optional*): folder or file in the place of its data set.
        limit (`int`, *optional*): take the first that belong to it.
        min_pixels (`int`, *optional*): smaller images are enlarged.
        max_pixels (`int`, *optional*): larger images are scaled down.

    Returns:
        [`Rows`]. Raises `ValueError` if there are none.
    """
    limits = ImageLimits(min_pixels, max_pixels)
    dataset, _ = undecoded(_load(benchmark, path))
    source = path or benchmark.dataset
    folder = None if path is None else Path(path).resolve()
    if folder is not None and folder.is_file():
        folder = folder.parent
    numbers: list[int] = []
    belonging = 0
    digest = hashlib.blake2b(digest_size=16)
    for start, row in enumerate(dataset):
        if not benchmark.keep(row):
            continue
        belonging += 1
        if limit is None or len(numbers) < limit:
            numbers.append(start)
            digest.update(json.dumps(_hashable(_with_files(row, folder)), sort_keys=True).encode())
    if not numbers:
        raise ValueError(f"{benchmark.name}: {source!r} has {len(dataset)} rows, none of which belongs to it.")
    return Rows(benchmark, dataset, numbers, belonging, digest.hexdigest(), source, limits, folder)


def _load(benchmark: Benchmark, path: str | None) -> Dataset:
    if path is not None and os.path.isfile(path):
        ending = os.path.splitext(path)[1]
        if ending not in BUILDERS:
            raise ValueError(
                f"benchmarks: {benchmark.name}={path!r} ends in {ending!r}; a file ends in {', '.join(BUILDERS)}."
            )
        return load_dataset(**file_arguments({"train": [path]}), split="train")
    source = path or benchmark.dataset
    # Which configurations a data set has is known of the published one; a folder has its files.
    config = None if path else benchmark.config
    if path is not None:
        splits = get_dataset_split_names(path)
        missing = [split for split in benchmark.split.split("+") if split not in splits]
        if missing:
            raise ValueError(f"benchmarks: {benchmark.name}={path!r} has no split {missing[0]!r}; it has {splits}.")
    return load_dataset(source, name=config, split=benchmark.split)


def _named(row: Mapping[str, Any]) -> str:
    """A row's own name for an error; nothing if it has none."""
    return next((f" ({column} {row[column]!r})" for column in _ID_COLUMNS if column in row), "")


def _with_files(value: Any, folder: Path | None) -> Any:
    """A row with paths of pictures in `folder` as `datasets` has them: tables in text hold nothing but the path."""
    if isinstance(value, Mapping) and value.keys() != {"bytes", "path"}:
        return {key: _with_files(entry, folder) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_files(entry, folder) for entry in value]
    if folder is not None and isinstance(value, str) and value.lower().endswith(PICTURE_ENDINGS):
        path = str(folder / value)
        if os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
            return {"bytes": None, "path": path}
    return value


def _hashable(value: Any) -> Any:
    """A row's content as JSON values: images and other bytes by their hash, not by where they lie."""
    if isinstance(value, Mapping):
        if value.keys() == {"bytes", "path"}:
            content = value["bytes"]
            if content is None and value["path"] and os.path.isfile(value["path"]):
                with open(value["path"], "rb") as file:
                    content = file.read()
            return _hashable(content)
        return {str(key): _hashable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_hashable(entry) for entry in value]
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=16).hexdigest()
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
