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


# Columns with names of rows.
_ID_COLUMNS = ("id", "pid", "unique_id", "sample_index", "index", "ID")
_FAULTS_SHOWN = 5
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Rows:
    """
    The rows of a benchmark.

    Args:
        benchmark ([`Benchmark`]): the benchmark.
        dataset ([`~datasets.Dataset`]): all rows of its split.
        numbers (`list[int]`): numbers of the rows that belong to the benchmark, up to the limit.
        belonging (`int`): how many rows belong to it without the limit.
        fingerprint (`str`): fingerprint of the content of these rows. It does not depend on their file.
        source (`str`): hub id or path.
        limits ([`~sapo_trl.data.images.ImageLimits`]): limits for the images' number of pixels.
        folder (`Path`, *optional*): folder to which paths of images are relative, for local files.
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
        """The problem of a row. Raises `ValueError` with the row's number and id for a bad row."""
        row = self.dataset[number]
        try:
            problem = self.benchmark.to_problem(_with_files(row, self.folder), number)
            images = [self.limits.resized(image) for image in problem.images]
        except Exception as error:  # rows from foreign files may raise any kind of error
            raise ValueError(
                f"{self.benchmark.name}: row {number} of {self.source!r}{_named(row)} is no problem of this benchmark "
                f"({type(error).__name__}: {error})."
            ) from error
        return replace(problem, images=images)

    def check(self, numbers: Iterable[int], advance: Callable[[], None] = lambda: None) -> None:
        """
        Read rows with their images, and score each row's own answer.

        Args:
            numbers (`Iterable[int]`): numbers of the rows.
            advance (`Callable`, *optional*): called after each row.

        Raises:
            ValueError: with all bad rows. A row is bad if it is not a problem, or if the scorer rejects its answer.
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
                f"these rows, or leave them out of a local copy. {' '.join(faults[:_FAULTS_SHOWN])}{more}"
            )

    def _fault(self, problem: Problem) -> str | None:
        """The reason why the problem's own answer does not count as right; `None` if it counts, or is not known."""
        if self.benchmark.right_answer is None:
            return None
        name, answer = f"{self.benchmark.name}: the problem {problem.id!r} of {self.source!r}", problem.answer
        if not answer.strip():
            return f"{name} has no answer, got {answer!r}."
        right = self.benchmark.right_answer(problem)
        try:
            score = self.benchmark.score(problem, rf"\boxed{{{right}}}")
        except Exception as error:  # a scorer that cannot read its gold must fail before the generation
            return f"{name} has the answer {answer!r}, which cannot be scored ({type(error).__name__}: {error})."
        return None if score.correct == 1.0 else f"{name} has the answer {answer!r}, but {right!r} scores as wrong."


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
        path (`str`, *optional*): folder or file to read instead of its data set.
        limit (`int`, *optional*): read only the first rows of the benchmark, at most this number.
        min_pixels (`int`, *optional*): smaller images are enlarged to this number.
        max_pixels (`int`, *optional*): larger images are scaled down to this number.

    Returns:
        [`Rows`]. Raises `ValueError` if there are no rows.
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
        raise ValueError(f"{benchmark.name}: none of the {len(dataset)} rows of {source!r} belongs to it.")
    return Rows(benchmark, dataset, numbers, belonging, digest.hexdigest(), source, limits, folder)


def _load(benchmark: Benchmark, path: str | None) -> Dataset:
    if path is None and benchmark.load is not None:
        return benchmark.load()
    if path is not None and os.path.isfile(path):
        ending = os.path.splitext(path)[1]
        if ending not in BUILDERS:
            raise ValueError(
                f"benchmarks: {benchmark.name}={path!r} ends in {ending!r}; a file ends in {', '.join(BUILDERS)}."
            )
        return load_dataset(**file_arguments({"train": [path]}), split="train")
    source = path or benchmark.dataset
    # Only the published data set has configurations. A folder has only files.
    config = None if path else benchmark.config
    if path is not None:
        splits = get_dataset_split_names(path)
        missing = [split for split in benchmark.split.split("+") if split not in splits]
        if missing:
            raise ValueError(f"benchmarks: {benchmark.name}={path!r} has no split {missing[0]!r}; it has {splits}.")
    return load_dataset(source, name=config, split=benchmark.split)


def _named(row: Mapping[str, Any]) -> str:
    """A row's own name for an error; empty if it has none."""
    return next((f" ({column} {row[column]!r})" for column in _ID_COLUMNS if column in row), "")


def _with_files(value: Any, folder: Path | None) -> Any:
    """A row with its paths of pictures in `folder` in `datasets`' form. Text tables hold only the path."""
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
    """A row's content as JSON values. Images and other bytes are replaced by their hash, without their path."""
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
