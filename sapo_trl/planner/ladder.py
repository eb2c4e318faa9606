"""Memory of a ladder, the small transformer beside the policy; it is whole on every GPU, and in float32."""

from __future__ import annotations

from ..critic.ladder import EXTRA_COLUMNS, LadderSizes, heads_of
from .setup import Setup
from .shapes import ModelShape


def ladder_sizes(setup: Setup, shape: ModelShape) -> LadderSizes:
    """The sizes that a run's ladder has."""
    sizes = (setup.critic_layers, setup.critic_width, setup.critic_reads)
    return LadderSizes.for_policy(shape.hidden, shape.layers, *sizes)


def ladder_activation_bytes(sizes: LadderSizes, hidden: int, compute_bytes: int) -> float:
    """
    Bytes that a ladder's backward needs, per token, without gradient checkpointing.

    Args:
        sizes ([`LadderSizes`]): of the ladder.
        hidden (`int`): width of the policy.
        compute_bytes (`int`): bytes of a number inside of matrix products.
    """
    width, heads = sizes.width, heads_of(sizes.width)
    product = compute_bytes * width
    # A norm keeps its float32 input, and its output before the weight. The products keep their inputs.
    norms = 2 * 2 * 4 * width
    attention = 4 * compute_bytes * (width + heads * EXTRA_COLUMNS)  # queries, keys, values and their mixture
    feed_forward = 2 * 2 * product
    block = norms + 3 * product + attention + feed_forward
    return sizes.reads * compute_bytes * hidden + sizes.layers * block + 2 * 4 * width


def kept_activation_bytes(setup: Setup, shape: ModelShape, compute_bytes: int) -> float:
    """
    Bytes of a ladder's activations while the policy's backward runs. With gradient checkpointing these are the
    projected states, and the rest is computed again when the policy's activations are gone.
    """
    sizes = ladder_sizes(setup, shape)
    per_token = ladder_activation_bytes(sizes, shape.hidden, compute_bytes)
    if setup.gradient_checkpointing:
        per_token = sizes.reads * compute_bytes * sizes.width
    return setup.micro_batch * setup.sequence_length * per_token
