"""Edges of earlier trees, kept to be trained on more than once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .portable import from_portable, to_portable
from .tree import Edge


@dataclass(eq=False)
class StoredEdge:
    """
    An edge, and the data to train on it in a later rollout.

    Args:
        example (`dict[str, Any]`): the prompt's row of the data set.
        edge ([`Edge`]): the edge.
        old_logps (`torch.Tensor`):
            float32 `(T,)` on the CPU: log-probabilities of the completion's tokens under the policy that sampled them.
        rewards (`torch.Tensor`): float32 `(F,)`, mean reward below the child by reward function.
        age (`int`, *optional*, defaults to `0`): number of rollouts since the edge was sampled.
    """

    example: dict[str, Any]
    edge: Edge
    old_logps: torch.Tensor
    rewards: torch.Tensor
    age: int = 0


@dataclass
class EdgeReplay:
    """
    Draws each rollout's edges from this and earlier rollouts' trees (SPO-tree,
    https://huggingface.co/papers/2505.23564).

    Args:
        max_age (`int`): number of rollouts that can draw an edge.
        edges_per_prompt (`int`): maximum number of a prompt's edges in one draw.
        seed (`int`): of the draws.
    """

    max_age: int
    edges_per_prompt: int
    seed: int
    _prompts: list[list[StoredEdge]] = field(default_factory=list)
    _random: random.Random = field(init=False)

    def __post_init__(self):
        self._random = random.Random(self.seed)

    def __len__(self) -> int:
        return sum(map(len, self._prompts))

    def add(self, edges_by_prompt: Sequence[list[StoredEdge]]) -> None:
        """Add a rollout's edges, one list for each prompt. The stored edges age by one rollout; the oldest go."""
        for edges in self._prompts:
            for edge in edges:
                edge.age += 1
        self._prompts = [[edge for edge in edges if edge.age < self.max_age] for edges in self._prompts]
        self._prompts.extend(list(edges) for edges in edges_by_prompt)
        self._prompts = [edges for edges in self._prompts if edges]

    def draw(self, number: int) -> list[StoredEdge]:
        """
        Draw edges to train on: some of each prompt, all of them shuffled. A drawn edge is no longer stored.

        Args:
            number (`int`): how many.

        Returns:
            `list[StoredEdge]`: `number` edges, repeated from the start if there are fewer; empty without any.
        """
        drawn = []
        for edges in self._prompts:
            self._random.shuffle(edges)
            drawn.extend((edges, edge) for edge in edges[: self.edges_per_prompt])
        self._random.shuffle(drawn)
        # Edges beyond `number` stay for the next rollout.
        drawn = drawn[:number]
        for edges, edge in drawn:
            edges.remove(edge)
        return [drawn[index % len(drawn)][1] for index in range(number)] if drawn else []

    def state(self) -> dict[str, Any]:
        """
        The state that a resumed run needs to draw the same edges.

        Returns:
            `dict[str, Any]`: tensors, numbers, strings, bytes and containers of them.

        Raises:
            TypeError: if a row of the data set holds something else (images become bytes).
        """
        # A prompt's edges share one row of the data set: it is written once.
        examples: dict[int, int] = {}
        rows, prompts = [], []
        for edges in self._prompts:
            for item in edges:
                if id(item.example) not in examples:
                    examples[id(item.example)] = len(rows)
                    rows.append(to_portable(item.example))
            prompts.append(
                [
                    {
                        "example": examples[id(item.example)],
                        "edge": asdict(item.edge),
                        "old_logps": item.old_logps,
                        "rewards": item.rewards,
                        "age": item.age,
                    }
                    for item in edges
                ]
            )
        version, numbers, gauss = self._random.getstate()
        return {"examples": rows, "prompts": prompts, "random": [version, list(numbers), gauss]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state that [`EdgeReplay.state`] returned."""
        examples = [from_portable(row) for row in state["examples"]]
        self._prompts = [
            [
                StoredEdge(
                    examples[item["example"]],
                    Edge(**item["edge"]),
                    item["old_logps"].cpu(),
                    item["rewards"].cpu(),
                    item["age"],
                )
                for item in edges
            ]
            for edges in state["prompts"]
        ]
        version, numbers, gauss = state["random"]
        self._random.setstate((version, tuple(numbers), gauss))
