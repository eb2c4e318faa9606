"""From a value head's output to values: the start of training, and the range of the rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


# A start at an end of the range would be at infinity, and close to it the slope is nearly 0.
_MARGIN = 0.05


@dataclass
class ValueOutput:
    """
    Values from a head's output `z`: `z + offset`, or within a range `[low, high]`

    `low + (high - low) * (1/2 + atan(z + offset) / pi)`,

    the bounded critic of BPCO (https://huggingface.co/papers/2608.23566, Eq. 9).

    The offset has the effect of an initial bias of the head. It is a number beside the head, not written into its
    bias, because the weights may be sharded by then.

    Args:
        value_range (`list[float]`, *optional*): `low` and `high`; `None` for no bounds.
        offset (`float`, *optional*, defaults to `0.0`): added to the head's output.
        is_set (`bool`, *optional*, defaults to `False`):
            whether the values have a start already: they were set, or the head was saved.
    """

    value_range: list[float] | None = None
    offset: float = 0.0
    is_set: bool = False

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        """Values of a head's output, of any shape."""
        if self.offset != 0.0:
            output = output + self.offset
        if self.value_range is None:
            return output
        low, high = self.value_range
        return low + (high - low) * (0.5 + torch.atan(output) / math.pi)

    def start_at(self, value: float) -> None:
        """Let a head's output of 0 stand for a value; within a range at least 5 % of it away from its ends."""
        self.is_set = True
        if self.value_range is None:
            self.offset = value
            return
        low, high = self.value_range
        share = min(max((value - low) / (high - low), _MARGIN), 1 - _MARGIN)
        self.offset = math.tan(math.pi * (share - 0.5))

    def settings(self) -> dict[str, Any]:
        """The numbers to save with the head, as far as there are any."""
        settings = {"value_range": self.value_range, "value_offset": self.offset or None}
        return {name: number for name, number in settings.items() if number is not None}

    @classmethod
    def saved(cls, settings: dict[str, Any]) -> ValueOutput:
        """The output of a saved head, from its [`ValueOutput.settings`]."""
        return cls(settings.get("value_range"), settings.get("value_offset", 0.0), is_set=True)

    def set_range(self, value_range: list[float] | None) -> None:
        """
        Bound the values of a new head. A saved head keeps its range: another one would change its values.

        Raises:
            ValueError: if a saved head has another range.
        """
        value_range = None if value_range is None else list(map(float, value_range))
        if self.is_set and self.value_range != value_range:
            raise ValueError(
                f"The saved critic was trained with `value_range={self.value_range}`, but the run's is {value_range}: "
                "set `value_range` to the critic's."
            )
        self.value_range = value_range
