"""A benchmark's rows, from the hub or from local files, as problems."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, get_dataset_split_names, load_dataset
from PIL import Image

from .benchmark import Benchmark, Problem


FILE_LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}


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
        min_pixels (`int`, *optional*): smaller images are enlarged.
        max_pixels (`int`, *optional*): larger images are scaled down.
    """

    benchmark: Benchmark
    dataset: Dataset
    numbers: list[int]
    belonging: int
    fingerprint: str
    source: str
    min_pixels: int | None = None
    max_pixels: int | None = None

    def problem(self, number: int) -> Problem:
        """The problem in a row. Raises `ValueError` with the row's number if it cannot be made."""
        try:
            problem = self.benchmark.to_problem(self.dataset[number], number)
            images = [within_pixels(image, self.min_pixels, self.max_pixels) for image in problem.images]
        except Exception as error:  # of any kind: rows come from files that nobody here has written
            raise ValueError(
                f"{self.benchmark.name}: row {number} of {self.source!r} is no problem of this benchmark "
                f"({type(error).__name__}: {error})."
            ) from error
        return replace(problem, images=images)


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
        min_pixels (`int`, *optional*): see [`Rows`].
        max_pixels (`int`, *optional*): see [`Rows`].

    Returns:
        [`Rows`]. Raises `ValueError` if there are none.
    """
    dataset = _load(benchmark, path)
    source = path or benchmark.dataset
    numbers: list[int] = []
    belonging = 0
    digest = hashlib.blake2b(digest_size=16)
    # Arrow tables, in which images stay encoded: which rows belong to a benchmark does not depend on pixels.
    for start, table in enumerate(dataset.with_format("arrow").iter(1)):
        row = table.to_pylist()[0]
        if not benchmark.keep(row):
            continue
        belonging += 1
        if limit is None or len(numbers) < limit:
            numbers.append(start)
            digest.update(json.dumps(_hashable(row), sort_keys=True).encode())
    if not numbers:
        raise ValueError(f"{benchmark.name}: {source!r} has {len(dataset)} rows, none of which belongs to it.")
    return Rows(benchmark, dataset, numbers, belonging, digest.hexdigest(), source, min_pixels, max_pixels)


def _load(benchmark: Benchmark, path: str | None) -> Dataset:
    if path is not None and os.path.isfile(path):
        ending = os.path.splitext(path)[1]
        if ending not in FILE_LOADERS:
            raise ValueError(
                f"benchmarks: {benchmark.name}={path!r} ends in {ending!r}; a file ends in {', '.join(FILE_LOADERS)}."
            )
        options = {"sep": "\t"} if ending == ".tsv" else {}
        return load_dataset(FILE_LOADERS[ending], data_files=path, split="train", **options)
    source = path or benchmark.dataset
    # Which configurations a data set has is known of the published one; a folder has its files.
    config = None if path else benchmark.config
    if path is not None:
        splits = get_dataset_split_names(path)
        missing = [split for split in benchmark.split.split("+") if split not in splits]
        if missing:
            raise ValueError(f"benchmarks: {benchmark.name}={path!r} has no split {missing[0]!r}; it has {splits}.")
    return load_dataset(source, name=config, split=benchmark.split)


def within_pixels(image: Image.Image, least: int | None, most: int | None) -> Image.Image:
    """An image scaled so that its number of pixels lies between two limits; itself where it does."""
    pixels = image.width * image.height
    if pixels == 0:
        raise ValueError(f"an image has {image.width} x {image.height} pixels")
    wanted = max(pixels, least or 0)
    wanted = min(wanted, most or wanted)
    if wanted == pixels:
        return image
    factor = math.sqrt(wanted / pixels)
    # Down where there is a most, so that it is kept; up where there is a least.
    rounded = math.floor if wanted < pixels else math.ceil
    size = tuple(max(1, rounded(side * factor)) for side in image.size)
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


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
