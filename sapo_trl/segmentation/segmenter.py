"""The form of a segmenter."""

from __future__ import annotations

import inspect
from typing import Protocol

import torch

from ..segments import Segments


class Segmenter(Protocol):
    """
    A callable that cuts responses; the trainer calls it once per rollout.

    Args:
        entropies (`torch.Tensor`): float32 tensor of shape `(B, T)`, entropy of the old policy at each token.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens to partition; holes are allowed.
        logps (`torch.Tensor`): float32 tensor of shape `(B, T)`, log-probability of each sampled token. Optional.
        completion_ids (`torch.Tensor`): int64 tensor of shape `(B, T)`. Optional.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): optional.

    Returns:
        [`Segments`]: must cover the mask exactly.
    """

    def __call__(self, entropies: torch.Tensor, mask: torch.Tensor) -> Segments: ...


def accepted_inputs(segmenter: Segmenter) -> list[str]:
    """The optional inputs that a segmenter takes."""
    optional = ["logps", "completion_ids", "tokenizer"]
    parameters = inspect.signature(segmenter).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return optional
    return [name for name in optional if name in parameters]
