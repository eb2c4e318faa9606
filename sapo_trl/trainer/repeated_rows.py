"""Rows of a data set, read once a rollout however often they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset


class RepeatedRows(torch.utils.data.Dataset):
    """
    A data set whose rows are not read, nor their images decoded, while they are still at hand.

    TRL's loader asks for all rows of a rollout before each of its micro-batches, of which the first alone uses them,
    and for a prompt's row once for each of its responses: with images, decoding would take longer than much of what
    it waits for. The rows of one request are kept until one for others comes.

    Args:
        dataset ([`~datasets.Dataset`]): the rows.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self._rows: dict[int, dict[str, Any]] = {}
        self._asked_for: list[int] = []
        self._answer: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """
        Rows for a batch. Each is its own copy, as if it had been read; of the same request made again they are the
        same objects.
        """
        if list(indices) != self._asked_for:
            missing = [index for index in dict.fromkeys(indices) if index not in self._rows]
            rows = self._rows | dict(zip(missing, self.dataset.__getitems__(missing), strict=True))
            self._rows = {index: rows[index] for index in indices}
            self._asked_for = list(indices)
            self._answer = [copy.deepcopy(self._rows[index]) for index in indices]
        return list(self._answer)
