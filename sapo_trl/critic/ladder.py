"""The ladder: a small causal transformer beside the policy, fed with the policy's detached hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..segments import accumulation_dtype
from .policy_states import normalised


_EPSILON = 1e-6
_HEAD_WIDTH = 64
_MIN_HEADS = 4
# Half precision has whole numbers up to this one.
_EXACT = 256
# An attention score that no other reaches; half precision has it.
_MASKED = -30_000.0
# Columns behind a head's own: the distance needs four, the mask one, and fused kernels multiples of eight.
EXTRA_COLUMNS = 8


@dataclass(frozen=True)
class LadderSizes:
    """
    Sizes of a ladder.

    Args:
        layers (`int`): its transformer layers.
        width (`int`): their width, a multiple of 64.
        reads (`int`): hidden states of the policy that it reads.

    Raises:
        ValueError: for sizes that no ladder has.
    """

    layers: int
    width: int
    reads: int

    def __post_init__(self):
        for name, size in (("layers", self.layers), ("width", self.width), ("reads", self.reads)):
            if size < 1:
                raise ValueError(f"`critic_{name}` must be at least 1, got {size}.")
        if self.width % _HEAD_WIDTH != 0:
            raise ValueError(
                f"`critic_width` must be a multiple of {_HEAD_WIDTH}, as attention heads are, got {self.width}."
            )

    @classmethod
    def for_policy(
        cls,
        hidden_size: int,
        policy_layers: int,
        layers: int | None = None,
        width: int | None = None,
        reads: int | None = None,
    ) -> LadderSizes:
        """
        The given sizes, completed for a policy: a quarter of its width, one layer for eight of its layers (2 to 4),
        and a hidden state for each layer. That is 0.3 to 0.6 % of the parameters of a policy of 3 to 8 billion.

        Args:
            hidden_size (`int`): width of the policy.
            policy_layers (`int`): its layers.
            layers (`int`, *optional*): see [`LadderSizes`].
            width (`int`, *optional*): see [`LadderSizes`].
            reads (`int`, *optional*): see [`LadderSizes`].
        """
        layers = min(max(-(-policy_layers // 8), 2), 4) if layers is None else layers
        width = _HEAD_WIDTH * max(hidden_size // (4 * _HEAD_WIDTH), 1) if width is None else width
        return cls(layers, width, min(layers, policy_layers + 1) if reads is None else reads)

    def parameters(self, hidden_size: int) -> int:
        """Number of parameters, without the value head's."""
        heads = heads_of(self.width)
        block = 8 * self.width**2 + 2 * self.width + heads
        return self.reads * hidden_size * self.width + self.layers * block + self.width


class Ladder(nn.Module):
    """
    A few causal transformer layers of small width. Each of the policy's hidden states that it reads is normalised and
    projected, and added in front of one of its layers, in the order of the policy's layers.

    Attention is causal. A learned slope for each head lowers the scores of distant tokens; there are no other
    positions. Distance counts attended tokens, so that padding changes no value.

    The parameters are in float32. Norms, slopes and the sum that goes from layer to layer are computed in float32.
    Matrix products follow autocast. Without it they follow the policy's hidden states, if these are in half precision.

    Args:
        hidden_size (`int`): width of the policy's hidden states.
        sizes ([`LadderSizes`]): of the ladder.
        checkpoints (`bool`, *optional*, defaults to `False`):
            whether to keep the projected states alone for the backward, and to compute the rest again. It saves
            memory while the policy's backward runs, which comes first.
    """

    def __init__(self, hidden_size: int, sizes: LadderSizes, checkpoints: bool = False):
        super().__init__()
        self.sizes = sizes
        self.checkpoints = checkpoints
        self.projections = nn.ModuleList(
            nn.Linear(hidden_size, sizes.width, bias=False, dtype=torch.float32) for _ in range(sizes.reads)
        )
        self.blocks = nn.ModuleList(_Block(sizes.width) for _ in range(sizes.layers))
        self.output_norm = nn.RMSNorm(sizes.width, eps=_EPSILON, dtype=torch.float32)
        for projection in self.projections:
            nn.init.normal_(projection.weight, std=hidden_size**-0.5)

    def take(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Project one of the policy's hidden states, at once, so that the state itself need not be kept.

        Args:
            index (`int`): place of the state among the states that the ladder reads, from 0.
            hidden_states (`torch.Tensor`): detached, float `(B, S, H)`.

        Returns:
            `torch.Tensor`: float `(B, S, width)`.
        """
        with _half_precision_of(hidden_states):
            return self._maybe_again(self._projected, index, hidden_states)

    def forward(self, taken: Sequence[torch.Tensor], attention_mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            taken (`Sequence[torch.Tensor]`): results of [`Ladder.take`], one for each state, in order.
            attention_mask (`torch.Tensor`): `(B, S)`, not 0 on tokens.

        Returns:
            `torch.Tensor`: normalised, `(B, S, width)`, float32 or wider.
        """
        with _half_precision_of(taken[0]):
            return self._maybe_again(self._through_blocks, _columns(attention_mask), *taken)

    def _maybe_again(self, function: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
        if not (self.checkpoints and torch.is_grad_enabled()):
            return function(*inputs)
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _projected(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        projection = self.projections[index]
        return projection(normalised(hidden_states).to(projection.weight.dtype))

    def _through_blocks(self, columns: torch.Tensor, *taken: torch.Tensor) -> torch.Tensor:
        dtype = accumulation_dtype(taken[0])
        x = torch.zeros_like(taken[0], dtype=dtype)
        for place, block in enumerate(self.blocks):
            for index, states in enumerate(taken):
                if index * len(self.blocks) // len(taken) == place:
                    x = x + states.to(dtype)
            x = block(x, columns)
        return self.output_norm(x)


class _Block(nn.Module):
    """Attention and a feed-forward part of twice the width, each on the normalised sum."""

    def __init__(self, width: int):
        super().__init__()
        heads = heads_of(width)
        linear = {"bias": False, "dtype": torch.float32}
        self.attention_norm = nn.RMSNorm(width, eps=_EPSILON, dtype=torch.float32)
        self.queries_keys_values = nn.Linear(width, 3 * width, **linear)
        self.attention_output = nn.Linear(width, width, **linear)
        # Named a bias, so that it does not decay. The first slopes are ALiBi's, from steep to nearly flat.
        first = torch.arange(1, heads + 1, dtype=torch.float32) * (-8 / heads)
        self.log_slope_bias = nn.Parameter(first * torch.tensor(2.0).log())
        self.feed_forward_norm = nn.RMSNorm(width, eps=_EPSILON, dtype=torch.float32)
        self.up = nn.Linear(width, 2 * width, **linear)
        self.down = nn.Linear(2 * width, width, **linear)

    def forward(self, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        x = x + self._attention(self.attention_norm(x), columns)
        return x + self.down(F.silu(self.up(self.feed_forward_norm(x))))

    def _attention(self, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """
        Attention with the score `q k / sqrt(d) - slope * distance`.

        The distance is a difference of positions, so its product with the slope is a product of further columns of
        queries and keys. It needs no matrix: fused kernels then keep no scores at all.

        The query's position shifts all scores of a row, which changes no output. It is there for the gradient of the
        slope. Half precision rounds the gradients of a row's scores, which then do not add up to 0. With the key's
        position alone, the rest would be multiplied by a position instead of a distance.
        """
        heads = len(self.log_slope_bias)
        projected = self.queries_keys_values(x).unflatten(-1, (3, heads, -1))
        queries, keys, values = projected.permute(2, 0, 3, 1, 4)
        slopes = self.log_slope_bias.exp()[:, None, None]  # (heads, 1, 1)
        positions, masked = columns[:, None].split([2, 1], dim=-1)  # of one head
        base = positions.new_tensor([_EXACT, 1.0]).expand_as(positions)
        output = F.scaled_dot_product_attention(
            _extended(queries * queries.size(-1) ** -0.5, slopes * base, -slopes * positions, torch.ones_like(masked)),
            _extended(keys, positions, base, masked),
            F.pad(values, (0, EXTRA_COLUMNS)),
            is_causal=True,
            scale=1.0,
        )[..., :-EXTRA_COLUMNS]
        return self.attention_output(output.transpose(1, 2).flatten(2))


def _columns(attention_mask: torch.Tensor) -> torch.Tensor:
    """
    `(B, S, 3)`: each position among the attended tokens, in two digits so that half precision has it exactly; and a
    score that keeps padding out.
    """
    is_token = attention_mask.bool()
    positions = (is_token.long().cumsum(1) - 1).clamp(min=0)
    masked = torch.where(is_token, 0.0, _MASKED)
    return torch.stack([(positions // _EXACT).float(), (positions % _EXACT).float(), masked], dim=-1)


def _extended(x: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
    """`(B, heads, S, d)` with further columns, `(B or 1, heads or 1, S, any)`, and zeros behind them."""
    further = [column.to(x.dtype).expand(*x.shape[:-1], -1) for column in columns]
    zeros = x.new_zeros(()).expand(*x.shape[:-1], EXTRA_COLUMNS - sum(column.size(-1) for column in columns))
    return torch.cat([x, *further, zeros], dim=-1)


def heads_of(width: int) -> int:
    """Attention heads of a ladder's layer."""
    return max(width // _HEAD_WIDTH, _MIN_HEADS)


def _half_precision_of(states: torch.Tensor) -> contextlib.AbstractContextManager:
    device = states.device.type
    if states.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(device):
        return torch.autocast(device, states.dtype)
    return contextlib.nullcontext()
