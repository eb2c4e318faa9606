"""SPO-tree against trees that the test grows itself."""

import math
import random
from dataclasses import dataclass

import torch

from sapo_trl.rollouts.types import PolicyForward
from tests.trainer.preset_references.comparison import EXACT, Comparison, compare_losses, compare_rollout
from tests.trainer.preset_references.definitions import SampledValues, mean, whiten
from tests.trainer.preset_references.made_up_trainer import TEXT_FAMILY, Continuations, padded, record_of, trainer_of
from tests.trainer.preset_references.responses import NUM_ROWS, Response


TREE_WIDTHS, EDGE_LENGTH, TREE_COMPLETION_LENGTH = [2, 2, 2], 3, 12


def made_up_logp(version: str, tokens: tuple[int, ...]) -> float:
    """Log-probability of the last of some tokens behind the others."""
    rng = random.Random(f"{version} {tokens}")
    return math.log(rng.uniform(0.92, 0.999) if rng.random() < 0.4 else rng.uniform(0.02, 0.85))


class TreeReward(Continuations):
    # Multiples of a quarter, and nodes of at most two children: exact also in float32, in which the package keeps the
    # values of nodes between growing a tree and training on it.
    @staticmethod
    def reward(completion: list[int]) -> float:
        return math.nan if sum(completion) % 6 == 0 else (sum(completion) % 5) / 4


@dataclass
class Node:
    value: float
    parent: "Node | None"
    tokens: tuple[int, ...]  # prompt and response
    length: int  # tokens of the edge above
    version: str


def grown(continuations: TreeReward, prompt: tuple[int, ...], version: str) -> list[Node]:
    """The nodes of the tree below a prompt, rebuilt from the sampled edges."""
    nodes = []

    def visit(tokens: tuple[int, ...], depth: int, length: int) -> Node:
        node = Node(math.nan, None, tokens, length, version)
        nodes.append(node)
        response = list(tokens[len(prompt) :])
        if depth == 3 or response[-1:] == [continuations.end_token] or len(response) == TREE_COMPLETION_LENGTH:
            node.value = continuations.reward(response)
            return node
        samples = continuations.of_state[tokens]
        assert len(samples) == TREE_WIDTHS[depth]
        children = []
        for sample in samples:
            room = TREE_COMPLETION_LENGTH - len(response)
            edge = sample[: room if depth == 2 else min(EDGE_LENGTH, room)]
            children.append(visit((*tokens, *edge), depth + 1, len(edge)))
            children[-1].parent = node
        known = [child.value for child in children if not math.isnan(child.value)]
        node.value = mean(known) if known else math.nan
        return node

    visit(prompt, 0, 0)
    return nodes


@TEXT_FAMILY
def test_tree(family, tmp_path):
    """SPO-tree: edges of a grown tree, trained on in this rollout and in the next one."""
    trainer = trainer_of(
        "spo_tree",
        family,
        tmp_path,
        tree_widths=TREE_WIDTHS,
        tree_segment_length=EDGE_LENGTH,
    )
    tokenizer, reference = family.tokenizer, SampledValues()
    continuations = TreeReward(tokenizer.eos_token_id, random.Random(0))
    version = ["first"]
    trainer.continuation_sampler = lambda prompts, inputs, *_: continuations.sampler(
        prompts, list(range(len(inputs))), trainer.weighted_rewards, TREE_COMPLETION_LENGTH
    )

    def made_up_row(name: str, prompt: list[int], ids: list[int]) -> list[float]:
        return [made_up_logp(name, (*prompt, *ids[: t + 1])) for t in range(len(ids))]

    def policy_forward(model, batch, batch_size=None, frozen=False) -> PolicyForward:
        if "current_logps" in batch:
            return PolicyForward(batch["current_logps"], batch["entropies"])
        logps = []
        for row in range(len(batch["prompt_ids"])):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            logps.append(made_up_row(version[0], prompt, ids))
        logps = padded(logps, lambda: 7.0)
        return PolicyForward(logps, torch.zeros_like(logps))

    trainer.policy_forward = policy_forward
    compare = Comparison(EXACT)
    nodes: dict[tuple[int, ...], Node] = {}
    versions_trained_on = set()
    for rollout, name in enumerate(("first", "second")):
        version[0] = name
        examples = [trainer.train_dataset[2 * rollout + i] for i in range(2)]
        given, _ = trainer.plan_rollout([example for example in examples for _ in range(4)])
        assert len(given.completion_ids) == NUM_ROWS
        for prompt in trainer.tokenized_prompts(examples).ids:
            grown_nodes = grown(continuations, tuple(prompt), name)
            nodes |= {node.tokens: node for node in grown_nodes}
            root = given.tensors["root_values"].tolist()
            assert any(value == grown_nodes[0].value for value in root)

        prompts = trainer.tokenized_prompts(given.inputs)
        batch = prompts.model_inputs(
            range(NUM_ROWS), given.completion_ids, tokenizer.pad_token_id, torch.device("cpu")
        )
        rows, rng = [], random.Random(name)
        for index, ids in enumerate(given.completion_ids):
            prompt = prompts.ids[index]
            node = nodes[(*prompt, *ids)]
            assert not math.isnan(node.value) and node.value != node.parent.value
            versions_trained_on.add(node.version)
            start = len(ids) - node.length
            logps = made_up_row(node.version, prompt, ids)
            row = Response(
                prompt=prompt,
                ids=ids,
                texts=[""] * len(ids),
                kept=list(range(start, len(ids))),
                reward=node.value,
                logps=logps,
                entropies=[0.0] * len(ids),
                values=[0.0] * len(ids),
                ref_logps=[logp + rng.gauss(0, 0.3) for logp in logps],
                new_logps=[logp + rng.gauss(0, 0.3) for logp in logps],
                new_values=[0.0] * len(ids),
            )
            row.segments = [row.kept]
            row.advantages = {t: node.value - node.parent.value for t in row.kept if math.exp(row.logps[t]) < 0.9}
            rows.append(row)
        whiten(rows)
        batch["ref_per_token_logps"] = padded([row.ref_logps for row in rows], lambda: 0.0)
        batch["entropies"] = padded([row.entropies for row in rows], lambda: 0.0)
        batch["advantages"] = torch.zeros(NUM_ROWS)
        record = record_of(rows, given=given, inputs=given.inputs)
        record.rewards = trainer.weighted_rewards(given.rewards_per_func).double()
        assert record.rewards.tolist() == [row.reward for row in rows]
        scored = trainer.score_rollout(batch, record)
        compare_rollout(compare, scored, rows, with_targets=False)
        compare_losses(compare, trainer, reference, scored, rows, rollout)
    assert versions_trained_on == {"first", "second"} and version == ["second"]
