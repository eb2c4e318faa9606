"""How a critic reads the policy's hidden states: in the policy's own forward, with gradients of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from ..critic.policy_states import decoder_layers
from ..critic.value_head import SegmentValueHead
from .padding import RightAligned


@dataclass(frozen=True)
class PolicyReader:
    """
    Reads a critic's values off the policy's hidden states.

    Args:
        critic ([`SegmentValueHead`]): of a mode that reads hidden states.
        learns (`bool`): whether its values carry gradients, which do not depend on whether the policy's outputs do.
    """

    critic: SegmentValueHead
    learns: bool

    @contextlib.contextmanager
    def tapped(
        self, backbone: PreTrainedModel, attention_mask: torch.Tensor, keep: Callable[[torch.Tensor], None]
    ) -> Iterator[None]:
        """
        Read the forwards that run inside.

        The hooks are gone when the backward begins. So gradient checkpointing, which runs layers again, feeds nothing
        a second time.

        Args:
            backbone ([`~transformers.PreTrainedModel`]): the transformer under the policy's LM head.
            attention_mask (`torch.Tensor`): `(b, S)`, of the forward's input.
            keep (`Callable`): takes the values, float32 `(b, S)`, once the last hidden state is there.
        """
        *depths, _ = self.critic.depths(backbone)
        taken: list[torch.Tensor] = []

        def take(states: torch.Tensor) -> None:
            # An adapter's virtual tokens stand in front of the columns of the input.
            taken.append(self._take(len(taken), states[:, -attention_mask.size(1) :]))

        def before_layer(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            take(args[0] if args else kwargs["hidden_states"])

        def after_layer(_module: nn.Module, _args: tuple, output: Any) -> None:
            take(output if torch.is_tensor(output) else output[0])

        def after_backbone(_module: nn.Module, _args: tuple, output: Any) -> None:
            take(output.last_hidden_state)
            with torch.set_grad_enabled(self.learns):
                values = self.critic.values_of(taken, attention_mask)
            taken.clear()
            keep(values)

        layers = decoder_layers(backbone) if depths else []
        handles = [backbone.register_forward_hook(after_backbone)]
        for depth in depths:
            if depth == 0:
                handles.append(layers[0].register_forward_pre_hook(before_layer, with_kwargs=True))
            else:
                handles.append(layers[depth - 1].register_forward_hook(after_layer))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        # A hook on a layer runs inside gradient checkpointing, which would throw away all that autograd saves there,
        # to have it again when the layer runs again.
        with torch.set_grad_enabled(self.learns), saved_tensors_hooks(_itself, _itself):
            return self.critic.take(index, hidden_states.detach())

    def at_completion(self, values: torch.Tensor, aligned: RightAligned | None, length: int) -> torch.Tensor:
        """
        Values of the states before each completion token, as log-probabilities are aligned.

        Args:
            values (`torch.Tensor`): float32 `(b, S)`, the value after each position.
            aligned ([`RightAligned`], *optional*): how the rows were moved.
            length (`int`): completion positions.
        """
        with torch.set_grad_enabled(self.learns):
            values = values[:, :-1]  # position p stands before token p + 1
            return (values if aligned is None else aligned.restore(values)[:, :-1])[:, -length:]

    def joined(self, chunks: Sequence[torch.Tensor], order: torch.Tensor | None = None) -> torch.Tensor:
        """The values of several forwards in one tensor, in another order if one is given."""
        with torch.set_grad_enabled(self.learns):  # a tensor that is made without gradients stays cut off from them
            values = torch.cat(chunks)
            return values if order is None else values[order]


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
