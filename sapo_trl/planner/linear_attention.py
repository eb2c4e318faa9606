"""
Memory of gated linear attention, as in Qwen3.5: activations for the backward, and the state that stands for a cache.

The activations are counted from transformers' PyTorch code. The kernels of flash-linear-attention and causal-conv1d,
which transformers takes on a GPU if they are installed, keep fewer tensors. So this is an upper limit there.
"""

from __future__ import annotations

from dataclasses import dataclass


CHUNK = 64
"""Tokens in a chunk of transformers' code. Within a chunk each token has a score for each other token."""


@dataclass(frozen=True)
class LinearAttention:
    """
    Sizes of a model's linear-attention layers.

    Args:
        layers (`int`): number of these layers.
        key_heads (`int`): heads of queries and keys.
        value_heads (`int`): heads of values.
        key_size (`int`): size of a head of queries and keys.
        value_size (`int`): size of a head of values.
        kernel (`int`): width of the convolution over tokens.
    """

    layers: int
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel: int

    @property
    def value_width(self) -> int:
        """Numbers of a token's values."""
        return self.value_heads * self.value_size

    @property
    def convolved_width(self) -> int:
        """Numbers of a token's queries, keys and values before their heads are repeated."""
        return 2 * self.key_heads * self.key_size + self.value_width

    def state_bytes(self, number_bytes: int = 2) -> int:
        """
        Bytes of a sequence's state in all layers. They do not depend on its length.

        Args:
            number_bytes (`int`, *optional*, defaults to `2`):
                bytes of a number of the convolution's state; the recurrent state is float32.
        """
        convolution = number_bytes * self.convolved_width * self.kernel
        return self.layers * (convolution + 4 * self.value_heads * self.key_size * self.value_size)


def linear_layer_activation_bytes(
    hidden: int, intermediate: int, sizes: LinearAttention, residual_bytes: int, compute_bytes: int
) -> float:
    """
    Bytes that the backward of one linear-attention layer needs, per token, in transformers' PyTorch code.

    Args:
        hidden (`int`): width of the hidden states.
        intermediate (`int`): width inside the feed-forward part.
        sizes ([`LinearAttention`]): of the layer.
        residual_bytes (`int`): bytes of a number between layers, which has the loaded weights' dtype.
        compute_bytes (`int`): bytes of a number inside of matrix products.
    """
    # Each norm keeps its input and its output before the weight, in float32. Under autocast float32 inputs are cast
    # once for each of the six matrices that read them.
    norms = 2 * (4 + 4) * hidden
    inputs = (6 if residual_bytes != compute_bytes else 2) * compute_bytes * hidden
    convolution = 2 * compute_bytes * sizes.convolved_width
    # Queries and keys have the values' number of heads here: in float32 as they come, normalized, decayed and solved,
    # and in half precision inside of products.
    repeated_keys = (24 + 7 * compute_bytes) * sizes.value_heads * sizes.key_size
    values = (20 + residual_bytes + 4 * compute_bytes) * sizes.value_width
    scores = (8 + 3 * compute_bytes) * sizes.value_heads * CHUNK
    states = (4 + 2 * compute_bytes) * sizes.value_heads * sizes.key_size * sizes.value_size / CHUNK
    return norms + inputs + convolution + repeated_keys + values + scores + states + 4 * compute_bytes * intermediate
