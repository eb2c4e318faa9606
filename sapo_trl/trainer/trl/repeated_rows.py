"""Rows of a data set, read once a rollout however often they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from PIL import Image


class RepeatedRows(torch.utils.data.Dataset):
    """
    A data set whose rows are not read, nor their images decoded, while they are still at hand.

    TRL's loader asks for all rows of a rollout before each of its micro-batches, and only the first micro-batch uses
    them. It asks for a prompt's row once for each of its responses. With images, decoding would take longer than much
    of the training. A loader with several workers has one such data set in each, and each worker reads once.

    Args:
        dataset ([`~datasets.Dataset`]): the rows.
        repeats (`int`): how often a rollout's rows are asked for.
    """

    def __init__(self, dataset: Dataset, repeats: int):
        self.dataset = dataset
        self.repeats = repeats
        self._asked_for: list[int] = []
        self._times = 0
        self._answer: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """
        Rows for a batch. Containers and images of each are its own, as if it had been read; of a rollout's further
        requests, which nobody looks at, they are the same objects.
        """
        if list(indices) != self._asked_for or self._times == self.repeats:
            different = list(dict.fromkeys(indices))
            rows = dict(zip(different, self.dataset.__getitems__(different), strict=True))
            self._asked_for, self._times = list(indices), 0
            self._answer = [_own(rows[index]) for index in indices]
        self._times += 1
        return list(self._answer)


def _own(value: Any) -> Any:
    """A copy of nested containers and of the images in them."""
    if isinstance(value, dict):
        return {name: _own(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_own(part) for part in value]
    return copy.deepcopy(value) if isinstance(value, Image.Image) else value
