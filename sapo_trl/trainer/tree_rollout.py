"""Tree rollouts for SPO-tree: grow, value, score, store, draw."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..config import SAPOConfig
from ..metrics import Measurements
from ..rollouts import ContinuationSampler, Edge, EdgeReplay, RolloutTree, TokenizedPrompts, grow_tree
from ..rollouts.replay import StoredEdge
from ..rollouts.tree import trainable_edges
from ..rollouts.types import GivenRollout


class TreeRollouts:
    """
    The training edges of rollouts whose responses are sampled as trees: of the current rollout and of earlier ones.

    Args:
        args ([`SAPOConfig`]): settings of the run.
        seed (`int`): of the draws; another one for each process.
    """

    def __init__(self, args: SAPOConfig, seed: int):
        num_rows = args.per_device_train_batch_size * args.steps_per_generation
        if num_rows % args.num_generations != 0:
            raise ValueError(
                f"A process's rows of a rollout, per_device_train_batch_size ({args.per_device_train_batch_size}) * "
                f"steps_per_generation ({args.steps_per_generation}) = {num_rows}, must be a whole number of trees of "
                f"num_generations ({args.num_generations}) edges each."
            )
        self.args = args
        self.replay = EdgeReplay(args.tree_replay_age, args.tree_edges_per_prompt, seed)

    def plan(
        self,
        examples: list[dict[str, Any]],
        prompts: TokenizedPrompts,
        sampler: ContinuationSampler,
        score: Callable[[list[int], list[list[int]]], torch.Tensor],
        batch_size: int,
        num_rows: int,
    ) -> tuple[GivenRollout, Measurements]:
        """
        Grow a tree below each prompt and draw the edges to train on.

        Args:
            examples (`list[dict]`): one row of the data set for each prompt.
            prompts ([`~sapo_trl.rollouts.TokenizedPrompts`]): of these rows.
            sampler ([`~sapo_trl.rollouts.ContinuationSampler`]): over these prompts.
            score (`Callable`):
                `(rows, completions) -> torch.Tensor`, float32 `(N, T)`: log-probabilities of the completions' tokens
                under the policy.
            batch_size (`int`): completions that are scored at a time.
            num_rows (`int`): edges to draw.

        Returns:
            `tuple[GivenRollout, Measurements]`: `num_rows` paths from the root to an edge's end, with the tensors
            `edge_start`, `parent_values`, `old_logps` and `root_values`; and what to log.
        """
        started = time.perf_counter()
        tree = grow_tree(sampler, range(len(prompts)), self.args.tree_widths, self.args.tree_segment_length)
        leaves = tree.leaves
        responses = [tree.prefix(leaf) for leaf in leaves]
        leaf_rewards = sampler.scores([tree.rows[leaf] for leaf in leaves], responses)
        outcomes = sampler.outcomes(leaf_rewards, responses, self.args.truncated_continuation_reward)
        # In float64, so that equal children are worth as much as their parent.
        values = tree.values(outcomes.double())
        rewards_per_func = tree.values(leaf_rewards.double()).float()
        edges = trainable_edges(tree, values)

        # Every process must run equally many forwards: a process with fewer edges repeats a leaf.
        filler = [leaves[0]] * (sampler.max_over_processes(len(edges)) - len(edges))
        scored = [(edge.row, edge.completion) for edge in edges] + [(tree.rows[n], tree.prefix(n)) for n in filler]
        logps = _in_batches(score, *map(list, zip(*scored, strict=True)), batch_size) if scored else []
        stored = [[] for _ in examples]
        for edge, row in zip(edges, logps, strict=False):
            rewards = rewards_per_func[edge.node].cpu()
            stored[edge.row].append(StoredEdge(examples[edge.row], edge, row, rewards))
        self.replay.add(stored)
        drawn = self.replay.draw(num_rows)

        device = leaf_rewards.device
        num_edges = len(tree) - len(examples)
        counts = {
            "tokens": (sum(map(len, tree.tokens)), 1),
            "leaves": (len(leaves), len(examples)),
            "dropped_edges": (num_edges - len(edges), num_edges),
            "edge_age": (sum(edge.age for edge in drawn), max(len(drawn), 1)),
        }
        metrics: Measurements = {
            f"tree/{name}": (torch.tensor(float(total), device=device), float(count))
            for name, (total, count) in counts.items()
        }
        metrics["time/tree"] = (torch.tensor(time.perf_counter() - started), 1.0)
        if not drawn:
            # All responses to each prompt are worth the same. TRL still needs rows: they begin where they end, so that
            # nothing is learned from them.
            drawn = [self._without_tokens(tree, leaf, examples, leaf_rewards[i]) for i, leaf in enumerate(leaves)]
            drawn = [drawn[row % len(drawn)] for row in range(num_rows)]
        given = GivenRollout(
            inputs=[item.example for item in drawn],
            completion_ids=[item.edge.completion for item in drawn],
            rewards_per_func=torch.stack([item.rewards for item in drawn]).to(device),
            outcomes=torch.tensor([item.edge.child_value for item in drawn], device=device),
            tensors={
                "edge_start": torch.tensor([item.edge.start for item in drawn], device=device),
                "parent_values": torch.tensor([item.edge.parent_value for item in drawn], device=device),
                "old_logps": pad_sequence([item.old_logps for item in drawn], batch_first=True).to(device),
                "root_values": values[torch.tensor(tree.parents, device=device) < 0].float(),
            },
        )
        return given, metrics

    @staticmethod
    def _without_tokens(
        tree: RolloutTree, leaf: int, examples: list[dict[str, Any]], rewards: torch.Tensor
    ) -> StoredEdge:
        row, completion = tree.rows[leaf], tree.prefix(leaf)
        edge = Edge(row, leaf, completion, len(completion), parent_value=0.0, child_value=0.0)
        return StoredEdge(examples[row], edge, torch.zeros(1), rewards.cpu())


@torch.no_grad()
def _in_batches(
    score: Callable[[list[int], list[list[int]]], torch.Tensor],
    rows: list[int],
    completions: list[list[int]],
    batch_size: int,
) -> list[torch.Tensor]:
    """float32 on the CPU, the scores of each completion's tokens; in batches, because each row brings images along."""
    logps: list[torch.Tensor] = []
    for start in range(0, len(rows), batch_size):
        chunk = slice(start, start + batch_size)
        scored = score(rows[chunk], completions[chunk]).cpu()
        logps.extend(row[: len(ids)].clone() for row, ids in zip(scored, completions[chunk], strict=True))
    return logps
