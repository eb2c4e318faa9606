"""Responses sampled as a tree, valued from its leaves up (SPO-tree, https://huggingface.co/papers/2505.23564)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .continuations import ContinuationSampler


@dataclass
class RolloutTree:
    """
    Trees over several prompts as flat lists: node `i` hangs under node `parents[i]` by the edge `tokens[i]`.

    Parents come before their children. A root has parent -1, no tokens, and stands for its prompt.

    Args:
        rows (`list[int]`): prompt of each node.
        parents (`list[int]`): index of each node's parent.
        depths (`list[int]`): 0 for roots.
        tokens (`list[list[int]]`): token ids of the edge that leads to the node.
        has_ended (`list[bool]`): whether the node's response is over: then it has no children.
    """

    rows: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    has_ended: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.parents)

    def add(self, row: int, parent: int, tokens: list[int], has_ended: bool) -> int:
        """Append a node and return its index."""
        self.rows.append(row)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
        self.tokens.append(tokens)
        self.has_ended.append(has_ended)
        return len(self) - 1

    def prefix(self, node: int) -> list[int]:
        """Response tokens from the root down to a node, its own edge included."""
        edges = []
        while node >= 0:
            edges.append(self.tokens[node])
            node = self.parents[node]
        return [token for edge in reversed(edges) for token in edge]

    @property
    def leaves(self) -> list[int]:
        """Nodes without children."""
        inner = set(self.parents)
        return [node for node in range(len(self)) if node not in inner]

    def values(self, leaf_rewards: torch.Tensor) -> torch.Tensor:
        """
        Value of each node: a leaf's reward, an inner node's mean over its children.

        Args:
            leaf_rewards (`torch.Tensor`):
                float tensor of shape `(L,)` or `(L, F)`, in the order of [`RolloutTree.leaves`]; NaN for a response
                without reward, which counts for no node above it.

        Returns:
            `torch.Tensor`: `(N,)` or `(N, F)`.
        """
        device = leaf_rewards.device
        parents, depths = torch.tensor(self.parents, device=device), torch.tensor(self.depths, device=device)
        values = leaf_rewards.new_full((len(self), *leaf_rewards.shape[1:]), torch.nan)
        values[torch.tensor(self.leaves, device=device)] = leaf_rewards
        # Level by level: a level's values are complete before its parents read them.
        for depth in range(max(self.depths), 0, -1):
            children = (depths == depth).nonzero().squeeze(1)
            known = (~values[children].isnan()).to(values.dtype)
            sums = torch.zeros_like(values).index_add(0, parents[children], values[children].nan_to_num(nan=0.0))
            counts = torch.zeros_like(values).index_add(0, parents[children], known)
            is_parent = torch.zeros_like(depths, dtype=torch.bool).index_fill(0, parents[children], True)
            is_parent = is_parent.view(-1, *[1] * (values.dim() - 1))
            values = torch.where(is_parent, sums / counts, values)  # NaN where no child has a reward
        return values


@dataclass
class Edge:
    """
    A training example: the step from a node to one of its children.

    Args:
        row (`int`): prompt.
        node (`int`): index of the child in its tree.
        completion (`list[int]`): response tokens from the root to the child.
        start (`int`): where in `completion` the edge's own tokens begin.
        parent_value (`float`): mean reward below the parent.
        child_value (`float`): mean reward below the child.
    """

    row: int
    node: int
    completion: list[int]
    start: int
    parent_value: float
    child_value: float


def grow_tree(
    sampler: ContinuationSampler, roots: Sequence[int], widths: Sequence[int], segment_length: int
) -> RolloutTree:
    """
    Sample a tree below each prompt.

    Args:
        sampler ([`ContinuationSampler`]): over the prompts.
        roots (`Sequence[int]`): which prompts.
        widths (`Sequence[int]`): number of children of a node, for each level.
        segment_length (`int`): maximum number of tokens of an edge. On the last level, responses run to their end.

    Returns:
        [`RolloutTree`]: a child that ends its response early, or has no room left, is a leaf.
    """
    tree = RolloutTree()
    frontier = [(tree.add(row, -1, [], False), []) for row in roots]
    for level, width in enumerate(widths):
        requests = [(node, prefix) for node, prefix in frontier for _ in range(width)]
        room = [sampler.max_completion_length - len(prefix) for _, prefix in requests]
        is_last = level == len(widths) - 1
        limits = room if is_last else [min(segment_length, limit) for limit in room]
        sampled = sampler.sample([tree.rows[node] for node, _ in requests], [prefix for _, prefix in requests], limits)
        frontier = []
        for (node, prefix), tokens in zip(requests, sampled, strict=True):
            completion = prefix + tokens
            has_ended = is_last or not sampler.can_go_on(completion)
            child = tree.add(tree.rows[node], node, tokens, has_ended)
            if not has_ended:
                frontier.append((child, completion))
    return tree


def trainable_edges(tree: RolloutTree, values: torch.Tensor) -> list[Edge]:
    """
    The edges with something to learn: the child's value differs from its parent's.

    Args:
        tree ([`RolloutTree`]): the trees.
        values (`torch.Tensor`): float tensor of shape `(N,)`, see [`RolloutTree.values`].

    Returns:
        `list[Edge]`
    """
    values_list = values.tolist()
    edges = []
    for node, parent in enumerate(tree.parents):
        if parent < 0 or not tree.tokens[node]:
            continue
        child_value, parent_value = values_list[node], values_list[parent]
        # NaN: no response below was scored. Equal but for the rounding of float32 rewards: nothing to learn.
        if math.isnan(child_value) or math.isclose(child_value, parent_value, rel_tol=1e-6, abs_tol=1e-6):
            continue
        completion = tree.prefix(node)
        start = len(completion) - len(tree.tokens[node])
        edges.append(Edge(tree.rows[node], node, completion, start, parent_value, child_value))
    return edges
