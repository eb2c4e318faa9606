"""
Every preset against its definition: the advantages, critic targets and losses that the trainer computes under it, next
to the same numbers from loops over responses and tokens in plain Python.

The references are written from the algorithms' definitions, with their published numbers, and share nothing with the
package. What a model would predict is made up: random log-probabilities and values in float64, so that both sides
agree to 1e-9 where the package does not round to float32 on its way.
"""

import math
import random

import pytest
import torch

from sapo_trl.presets import PRESETS
from sapo_trl.rollouts import TokenizedPrompts
from tests.trainer.preset_references.by_token import TOKEN_REFERENCES
from tests.trainer.preset_references.comparison import EXACT, Comparison, compare_losses, compare_rollout
from tests.trainer.preset_references.definitions import REFERENCES as DEFINITIONS
from tests.trainer.preset_references.definitions import VinePPO, k3, mean
from tests.trainer.preset_references.made_up_trainer import (
    IMAGE_FAMILY,
    NUM_CONTINUATIONS,
    TEXT_FAMILY,
    Continuations,
    batch_of,
    micro_batches_of,
    record_of,
    trainer_of,
)
from tests.trainer.preset_references.responses import (
    MAX_COMPLETION_LENGTH,
    NUM_ROWS,
    ROWS_PER_MICRO_BATCH,
    ROWS_PER_STEP,
    Response,
    at_entropies,
    made_up_responses,
)
from tests.trainer.preset_references.single_rollout import SINGLE_ROLLOUT_REFERENCES


REFERENCES = {**DEFINITIONS, **SINGLE_ROLLOUT_REFERENCES, **TOKEN_REFERENCES}


def test_every_preset_is_compared():
    assert REFERENCES.keys() | {"spo_tree", "srpo", "vppo", "papo"} == PRESETS.keys()


def compare_preset(compare: Comparison, trainer, preset: str, tokenizer, seed: int) -> list[Response]:
    """A made-up rollout and its updates; returns the responses with what the reference makes of them."""
    generations, reference = trainer.args.num_generations, REFERENCES[preset]
    # Values of sampled continuations know no tools.
    samples = trainer.args.critic == "monte_carlo"
    holes = seed % 2 == 1 and not samples
    drift = 4e-4 if preset == "gspo" else 0.15
    rows = made_up_responses(tokenizer, seed, generations, holes, drift)
    if trainer.args.advantage_estimator == "group":
        reference.rollout(rows, None)
    batch, kwargs = batch_of(rows, holes, tokenizer.pad_token_id), {}
    if trainer.args.beta == 0.0:
        del batch["ref_per_token_logps"]
    continuations = Continuations(tokenizer.eos_token_id, random.Random(seed))
    if samples:
        groups = [index // generations for index in range(len(rows))]
        kwargs["prompts"] = TokenizedPrompts([row.prompt for row in rows])
        trainer.continuation_sampler = lambda prompts, inputs, *_: continuations.sampler(
            prompts, groups, trainer.weighted_rewards, MAX_COMPLETION_LENGTH
        )
    scored = trainer.score_rollout(batch, record_of(rows, **kwargs))

    visited = set()

    def sampled_value(row: Response, t: int) -> float:
        state = (*row.prompt, *row.ids[:t])
        visited.add(state)
        results = continuations.of_state[state]
        assert len(results) == NUM_CONTINUATIONS  # once for all responses that pass through it
        rewards = []
        for result in results:
            completion = (row.ids[:t] + result)[:MAX_COMPLETION_LENGTH]
            is_cut_off = preset == "spo_chain" and completion[-1] != tokenizer.eos_token_id
            rewards.append(0.0 if is_cut_off else Continuations.reward(completion))
        rewards = [reward for reward in rewards if not math.isnan(reward)]
        return mean(rewards) if rewards else row.reward

    reference.rollout(rows, sampled_value if samples else lambda row, t: row.values[t])
    if samples:
        assert visited == continuations.of_state.keys()
    compare_rollout(compare, scored, rows, with_targets=trainer.critic is not None)
    compare_losses(compare, trainer, reference, scored, rows, seed)
    return rows


@TEXT_FAMILY
@pytest.mark.parametrize("preset", REFERENCES)
def test_rollout_and_losses(family, preset, tmp_path):
    trainer = trainer_of(preset, family, tmp_path)
    trainer.state.global_step = 60  # behind the longest value pretraining, BPCO's
    compare = Comparison(EXACT)
    rows = [compare_preset(compare, trainer, preset, family.tokenizer, seed) for seed in range(4)]
    if preset in SINGLE_ROLLOUT_REFERENCES:
        check_single_rollout_cases(preset, [row for case in rows for row in case])
    if preset == "sapo_official":
        assert max(a for row in rows[1] for a in row.advantages.values()) == 5.0


class BranchesAtEntropies(VinePPO):
    """Values of fresh continuations behind the tokens of highest entropy: FR3E's branches, with VinePPO's loss."""

    def __init__(self):
        self.cut = at_entropies


@TEXT_FAMILY
def test_branches_at_uncertain_tokens(family, tmp_path, monkeypatch):
    """The recipe of docs/algorithms.md: `segmentation="entropy"` with `critic="monte_carlo"`."""
    monkeypatch.setitem(REFERENCES, "vineppo", BranchesAtEntropies())
    trainer, compare = trainer_of("vineppo", family, tmp_path, segmentation="entropy"), Comparison(EXACT)
    for seed in range(2):
        rows = compare_preset(compare, trainer, "vineppo", family.tokenizer, seed)
        assert any(len(row.segments) > 3 for row in rows)


def check_single_rollout_cases(preset: str, rows: list[Response]) -> None:
    """The made-up numbers reach both sides of the trust region, for advantages of both signs."""
    reached = set()
    for row in rows:
        for t in row.tokens:
            ratio = math.exp(row.new_logps[t] - row.logps[t])
            change = math.exp(row.new_logps[t]) - math.exp(row.logps[t])
            limits = (ratio - 0.7, ratio - 6) if preset == "sao" else (change + 0.2, change - 0.2)
            side = "low" if limits[0] < 0 else "high" if limits[1] > 0 else "inside"
            reached.add((side, row.advantages[t] > 0))
    # No made-up drift makes a token six times as probable.
    sides = ("low", "inside") if preset == "sao" else ("low", "inside", "high")
    assert reached == {(side, positive) for side in sides for positive in (True, False)}


@IMAGE_FAMILY
@pytest.mark.parametrize("preset", ["grpo", "srpo", "vineppo", "spo_chain", "spo_tree"])
def test_kl_penalty_in_the_loss(family, preset, tmp_path):
    """Without advantages the loss is the KL penalty: beta times k3, off-policy too."""
    trainer = trainer_of(preset, family, tmp_path)
    rows = made_up_responses(family.tokenizer, 0, 4)
    batch = batch_of(rows, False, family.tokenizer.pad_token_id)
    mask = batch["completion_mask"].bool()
    batch |= {
        "segment_ids": torch.where(mask, 0, -1),
        "policy_mask": mask,
        "old_per_token_logps": batch["made_up_logps"],
        "advantages": torch.zeros_like(batch["made_up_logps"]),
        "rewards": torch.zeros(NUM_ROWS),
    }
    step = micro_batches_of(trainer, batch, list(range(NUM_ROWS)), rows)[: ROWS_PER_STEP // ROWS_PER_MICRO_BATCH]
    loss = sum(trainer.policy_loss(trainer.model, micro_batch) for micro_batch in step).item()
    penalties = [[k3(row, t) for t in row.kept] for row in rows[:ROWS_PER_STEP]]
    if preset in ("grpo", "srpo"):
        expected = 0.01 * mean([mean(penalty) for penalty in penalties])
    else:
        expected = 1e-4 * mean([sum(penalty) for penalty in penalties])
    assert loss == pytest.approx(expected, rel=EXACT)


@TEXT_FAMILY
def test_unscored_response_cannot_spoil_the_kl_penalty(family, tmp_path):
    """However far the policy is from the reference there: k3 overflows at a distance of 709, in float32 at 88."""
    trainer = trainer_of("vineppo", family, tmp_path)
    rows = made_up_responses(family.tokenizer, 0, 4)
    batch = batch_of(rows, False, family.tokenizer.pad_token_id)
    scored = torch.tensor([[not math.isnan(row.reward)] for row in rows])
    mask = batch["completion_mask"].bool() & scored
    batch |= {
        "segment_ids": torch.where(mask, 0, -1),
        "policy_mask": mask,
        "old_per_token_logps": batch["made_up_logps"],
        "ref_per_token_logps": torch.where(scored, batch["ref_per_token_logps"], 1000.0),
        "advantages": torch.zeros_like(batch["made_up_logps"]),
        "rewards": torch.zeros(NUM_ROWS),
    }
    for micro_batch in micro_batches_of(trainer, batch, list(range(NUM_ROWS)), rows):
        loss = trainer.policy_loss(trainer.model, micro_batch)
        loss.backward()
        assert loss.isfinite() and micro_batch["current_logps"].grad.isfinite().all()


@TEXT_FAMILY
@pytest.mark.parametrize("preset", ["vc_ppo", "vapo", "sao", "bpco"])
def test_only_the_critic_learns_during_value_pretraining(family, preset, tmp_path):
    trainer = trainer_of(preset, family, tmp_path)
    rows = made_up_responses(family.tokenizer, 0, trainer.args.num_generations)
    batch = batch_of(rows, False, family.tokenizer.pad_token_id)
    micro_batch, *_ = micro_batches_of(
        trainer, trainer.score_rollout(batch, record_of(rows)), list(range(len(rows))), rows
    )
    for step in (0, {"sao": 9, "bpco": 59}.get(preset, 49)):
        trainer.state.global_step = step
        loss = trainer.policy_loss(trainer.model, micro_batch)
        loss.backward()
        assert loss.item() == 0.0 and micro_batch["current_logps"].grad is None
        trainer.critic_loss(micro_batch, None).backward()
        assert micro_batch["current_values"].grad.abs().sum() > 0


@TEXT_FAMILY
def test_response_without_cut_points_has_no_gradient(family, tmp_path):
    """Of SPO-chain: neither from the advantages nor from the KL penalty, and no NaN if no response has any."""
    trainer = trainer_of("spo_chain", family, tmp_path)
    rows = made_up_responses(family.tokenizer, 0, 4)
    for row in rows:
        row.logps = [-0.01 for _ in row.ids]
    continuations = Continuations(family.tokenizer.eos_token_id, random.Random(0))
    trainer.continuation_sampler = lambda prompts, inputs, *_: continuations.sampler(
        prompts, [0] * len(rows), trainer.weighted_rewards, MAX_COMPLETION_LENGTH
    )
    batch = batch_of(rows, False, family.tokenizer.pad_token_id)
    record = record_of(rows, prompts=TokenizedPrompts([row.prompt for row in rows]))
    batch = trainer.score_rollout(batch, record)
    assert continuations.num_sampled == 0
    assert not batch["advantages"].any() and not batch["policy_mask"].any()
    for micro_batch in micro_batches_of(trainer, batch, list(range(len(rows))), rows):
        loss = trainer.policy_loss(trainer.model, micro_batch)
        loss.backward()
        assert loss.item() == 0.0 and not micro_batch["current_logps"].grad.any()
