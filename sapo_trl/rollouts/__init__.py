"""Rollouts beyond one response per prompt: continuations of exact prefixes, their mean rewards, and trees."""

from .continuations import ContinuationSampler, StateValues
from .prompts import TokenizedPrompts, has_images_by_row
from .replay import EdgeReplay
from .segment_values import monte_carlo_values
from .tree import Edge, RolloutTree, grow_tree


__all__ = [
    "ContinuationSampler",
    "Edge",
    "EdgeReplay",
    "RolloutTree",
    "StateValues",
    "TokenizedPrompts",
    "grow_tree",
    "has_images_by_row",
    "monte_carlo_values",
]
