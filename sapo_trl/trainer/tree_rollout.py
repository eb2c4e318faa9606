"""Tree rollouts for SPO-tree: grow, value, score, store, draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..config import SAPOConfig
from ..metrics import MetricAccumulator
from ..rollouts import ContinuationSampler, EdgeReplay, TokenizedPrompts, grow_tree
from ..rollouts.replay import StoredEdge
from ..rollouts.tree import trainable_edges
from .grpo_bridge import GivenRollout


class TreeRollouts:
    """
    What a rollout trains on when responses are sampled as trees: edges, of this and of earlier rollouts.

    Args:
        args ([`SAPOConfig`]): settings of the run.
        seed (`int`): of the draws; another one for each process.
    """

    def __init__(self, args: SAPOConfig, seed: int):
        self.args = args
        self.replay = EdgeReplay(args.tree_replay_age, args.tree_edges_per_prompt, seed)

    def plan(
        self,
        examples: list[dict[str, Any]],
        prompts: TokenizedPrompts,
        sampler: ContinuationSampler,
        score: Callable[[list[int], list[list[int]]], torch.Tensor],
        num_rows: int,
        metrics: MetricAccumulator,
    ) -> GivenRollout:
        """
        Grow a tree below each prompt and draw the edges to train on.

        Args:
            examples (`list[dict]`): one row of the data set for each prompt.
            prompts ([`~sapo_trl.rollouts.TokenizedPrompts`]): of these rows.
            sampler ([`~sapo_trl.rollouts.ContinuationSampler`]): over these prompts.
            score (`Callable`):
                `(rows, completions) -> torch.Tensor`, float32 `(N, T)`, log-probabilities under the policy.
            num_rows (`int`): edges to draw.
            metrics ([`~sapo_trl.metrics.MetricAccumulator`]): where to log.

        Returns:
            [`GivenRollout`]: `num_rows` paths from the root to an edge's end, with the tensors `edge_start`,
            `parent_values`, `old_logps` and `root_values`.
        """
        tree = grow_tree(sampler, range(len(prompts)), self.args.tree_widths, self.args.tree_segment_length)
        leaves = [(tree.rows[leaf], tree.prefix(leaf)) for leaf in tree.leaves]
        leaf_rewards = sampler.scores([row for row, _ in leaves], [completion for _, completion in leaves])
        # In float64, so that equal children are worth what their parent is.
        values = tree.values(sampler.weigh(leaf_rewards).double())
        edges = trainable_edges(tree, values)
        rewards_per_func = tree.values(leaf_rewards.double()).float()

        logps = [torch.empty(0)] * len(edges)
        if edges:
            scored = score([edge.row for edge in edges], [edge.completion for edge in edges]).cpu()
            logps = [row[: len(edge.completion)] for row, edge in zip(scored, edges, strict=True)]
        stored = [[] for _ in examples]
        for edge, old_logps in zip(edges, logps, strict=True):
            rewards = rewards_per_func[edge.node]
            stored[edge.row].append(StoredEdge(examples[edge.row], edge, old_logps.clone(), rewards.clone()))
        self.replay.add(stored)
        drawn = self.replay.draw(num_rows)

        num_edges = len(tree) - len(examples)
        device = leaf_rewards.device
        metrics.add_total("tree/leaves", torch.tensor(float(len(leaves)), device=device), len(examples))
        metrics.add_total("tree/dropped_edges", torch.tensor(float(num_edges - len(edges)), device=device), num_edges)
        metrics.add_total("tree/edge_age", torch.tensor(float(sum(edge.age for edge in drawn))), max(len(drawn), 1))
        root_values = values[torch.tensor(tree.parents, device=device) < 0].float()
        if not drawn:
            # All responses to each prompt are worth the same. TRL still needs rows: they train on nothing.
            completions = [leaves[row % len(leaves)] for row in range(num_rows)]
            return GivenRollout(
                inputs=[examples[row] for row, _ in completions],
                completion_ids=[completion for _, completion in completions],
                rewards_per_func=leaf_rewards[[row % len(leaves) for row in range(num_rows)]],
                tensors={
                    "edge_start": torch.tensor([len(completion) for _, completion in completions], device=device),
                    "parent_values": torch.zeros(num_rows, device=device),
                    "old_logps": torch.zeros(num_rows, 1, device=device),
                    "root_values": root_values,
                },
            )
        return GivenRollout(
            inputs=[item.example for item in drawn],
            completion_ids=[item.edge.completion for item in drawn],
            rewards_per_func=torch.stack([item.rewards for item in drawn]).to(device),
            tensors={
                "edge_start": torch.tensor([item.edge.start for item in drawn], device=device),
                "parent_values": torch.tensor([item.edge.parent_value for item in drawn], device=device),
                "old_logps": pad_sequence([item.old_logps for item in drawn], batch_first=True).to(device),
                "root_values": root_values,
            },
        )
