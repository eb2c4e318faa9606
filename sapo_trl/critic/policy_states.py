"""The policy's hidden states that a critic reads: their places, and their scale."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ..segments import accumulation_dtype


def read_depths(reads: int, layers: int) -> list[int]:
    """
    The hidden states to read, evenly spread from the embeddings to the last one.

    Args:
        reads (`int`): number of states; 1 for the last alone.
        layers (`int`): of the policy.

    Returns:
        `list[int]`: numbers from 0 (the embeddings, images among them) to `layers` (the last state, which the LM head
        reads). A number between is of the state after so many layers.

    Raises:
        ValueError: if the policy has fewer states.
    """
    if not 1 <= reads <= layers + 1:
        raise ValueError(
            f"`critic_reads` is {reads}, but a policy of {layers} layers has {layers + 1} hidden states to read: the "
            f"embeddings and one after each layer. Set `critic_reads` to at least 1 and at most {layers + 1}."
        )
    if reads == 1:
        return [layers]
    gaps = reads - 1
    return [(2 * index * layers + gaps) // (2 * gaps) for index in range(reads)]  # rounded half up


def normalised(states: torch.Tensor) -> torch.Tensor:
    """Hidden states `(B, S, H)` with a mean square of 1 at each position, in float32 or wider."""
    return torch.nn.functional.rms_norm(states.to(accumulation_dtype(states)), states.shape[-1:], eps=1e-6)


def num_layers_of(backbone: PreTrainedModel) -> int:
    """Layers of a text or image-text model's decoder."""
    return backbone.config.get_text_config().num_hidden_layers


def decoder_layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """
    The layers of a text or image-text model's decoder.

    Raises:
        ValueError: if they cannot be told from other modules.
    """
    number = num_layers_of(backbone)
    lists = [
        module
        for module in backbone.get_decoder().children()
        if isinstance(module, nn.ModuleList) and len(module) == number
    ]
    if len(lists) != 1:
        raise ValueError(
            f"The decoder of a model of type {backbone.config.model_type!r} has {len(lists)} lists of {number} "
            'modules, so its layers are not known: set `critic="shared"` with `critic_reads=1`, which reads the last '
            "hidden state alone."
        )
    return lists[0]
