"""VPPO and PAPO against loops over tokens: policies that are also asked without the picture."""

import random

import pytest
import torch

from sapo_trl.rollouts.types import PolicyForward
from tests.trainer.preset_references.by_token import PAPO, VPPO, Pictured
from tests.trainer.preset_references.comparison import EXACT, Comparison, compare_losses, compare_rollout
from tests.trainer.preset_references.made_up_trainer import IMAGE_FAMILY, batch_of, padded, record_of, trainer_of
from tests.trainer.preset_references.responses import NUM_ROWS, Response, made_up_responses
from tests.trainer.preset_references.test_token_masks import MaskedSegmentAligned


def blind_trainer(preset: str, family, tmp_path, **settings):
    """A trainer whose policy says what the batch says, also with corrupted images."""
    trainer = trainer_of(preset, family, tmp_path, **settings)
    plain = trainer.policy_forward

    def policy_forward(model, batch, batch_size=None, frozen=False) -> PolicyForward:
        if not batch.get("is_corrupted"):
            return plain(model, batch)
        name = "current_blind_logps" if "current_blind_logps" in batch else "blind_logps"
        return PolicyForward(batch[name], batch["entropies"])

    trainer.policy_forward = policy_forward

    class Corrupt:
        args = trainer.args

        def __call__(self, batch, seed):
            return {**batch, "is_corrupted": True}

        def again(self, batch):
            assert set(batch["corruption_seeds"]) == {trainer.args.seed}
            return self(batch, trainer.args.seed)

    trainer.corrupted_images = Corrupt()
    return trainer


def scored_rollout(trainer, reference: Pictured, family, seed: int, **settings) -> tuple[list[Response], dict]:
    rows = made_up_responses(family.tokenizer, seed, 4, holes=seed == 1)
    has_image = [index != 3 for index in range(NUM_ROWS)]
    reference.see(rows, has_image, seed)
    reference.rollout(rows, lambda row, t: row.values[t])
    batch = batch_of(rows, seed == 1, family.tokenizer.pad_token_id)
    if trainer.args.beta == 0.0:
        del batch["ref_per_token_logps"]
    batch["blind_logps"] = padded([reference.blind[id(row)] for row in rows], lambda: 9.0)
    batch["current_blind_logps_of_rollout"] = padded([reference.new_blind[id(row)] for row in rows], lambda: 9.0)
    batch["pixel_values"] = torch.zeros(4 * sum(has_image), 1176)
    batch["image_grid_thw"] = torch.tensor([[1, 2, 2]] * sum(has_image))
    batch["num_images"] = [int(image) for image in has_image]
    scored = trainer.score_rollout(batch, record_of(rows))
    for name in ("pixel_values", "image_grid_thw", "num_images"):
        del scored[name]
    if "corruption_seeds" in scored:
        scored["current_blind_logps"] = scored.pop("current_blind_logps_of_rollout")
    return rows, scored


@IMAGE_FAMILY
@pytest.mark.parametrize("seed", range(4))
def test_vppo(family, seed, tmp_path):
    trainer, reference, compare = blind_trainer("vppo", family, tmp_path), VPPO(), Comparison(EXACT)
    rows, scored = scored_rollout(trainer, reference, family, seed)
    assert any(0 < len(row.advantages) < len(row.tokens) for row in rows)
    compare_rollout(compare, scored, rows, with_targets=False)
    compare_losses(compare, trainer, reference, scored, rows, seed)
    for start in (0, 4):
        weights = list(reference.weights(rows[start : start + 4]).values())
        assert min(weights) == 0.9 and sum(weights) / len(weights) == pytest.approx(1.0, abs=EXACT)


class SightedSegmentAligned(VPPO):
    """SAPO whose policy learns from the 40 % of a response's tokens with the largest d that pass the other masks."""

    def __init__(self, masks: dict[str, float]):
        super().__init__()
        self.plain = MaskedSegmentAligned(masks)
        self.policy_loss, self.value_loss = self.plain.policy_loss, self.plain.value_loss

    def rollout(self, rows: list[Response], value) -> None:
        super().rollout(rows, value)
        by_sight = [set(row.advantages) for row in rows]
        for row in rows:
            row.advantages = {}
        self.plain.rollout(rows, value)
        for row, chosen in zip(rows, by_sight, strict=True):
            row.advantages = {t: a for t, a in row.advantages.items() if t in chosen}


@IMAGE_FAMILY
@pytest.mark.parametrize("masks", [{}, {"confident_token_threshold": 0.6, "entropy_token_share": 0.8}], ids=str)
def test_sapo_learns_from_tokens_that_depend_on_the_picture(family, masks, tmp_path):
    """The combination of docs/algorithms.md: values, returns and segments' ratios are of all tokens."""
    trainer = blind_trainer("sapo", family, tmp_path, visual_token_share=0.4, **masks)
    for seed in range(2):
        reference, compare = SightedSegmentAligned(masks), Comparison(EXACT)
        rows, scored = scored_rollout(trainer, reference, family, seed)
        assert any(0 < len(row.advantages) < len(row.tokens) for row in rows)
        compare_rollout(compare, scored, rows, with_targets=True)
        compare_losses(compare, trainer, reference, scored, rows, seed)


@IMAGE_FAMILY
@pytest.mark.parametrize("seed", range(4))
def test_papo(family, seed, tmp_path):
    trainer, reference, compare = blind_trainer("papo", family, tmp_path), PAPO(), Comparison(EXACT)
    rows, scored = scored_rollout(trainer, reference, family, seed)
    compare_rollout(compare, scored, rows, with_targets=False)
    compare_losses(compare, trainer, reference, scored, rows, seed)


class PAPOOfTheRollout(PAPO):
    """The blind policy is the rollout's, as in the official code's default; so it has no entropy to penalise."""

    def policy_loss(self, rows: list[Response]) -> float:
        tokens = [(row, t) for row in rows for t in row.tokens]
        seen = [-self.new_blind[id(row)][t] for row, t in tokens if self.has_image[id(row)]]
        return super().policy_loss(rows) - 0.03 * sum(seen) / len(tokens)


@IMAGE_FAMILY
def test_papo_without_a_gradient_through_the_blind_policy(family, tmp_path):
    trainer = blind_trainer("papo", family, tmp_path, perception_kl_gradient=False, corrupted_entropy_penalty_coef=0.0)
    reference, compare = PAPOOfTheRollout(), Comparison(EXACT)
    rows, scored = scored_rollout(trainer, reference, family, 0)
    reference.new_blind = reference.blind
    compare_losses(compare, trainer, reference, scored, rows, 0)


@IMAGE_FAMILY
def test_the_blind_policy_learns_too(family, tmp_path):
    """The gradient of PAPO's loss by the log-probabilities with corrupted images: differences of the reference's."""
    trainer, reference = blind_trainer("papo", family, tmp_path), PAPO()
    rows, scored = scored_rollout(trainer, reference, family, 2)
    blind = scored["current_blind_logps"].requires_grad_()
    scored["current_logps"] = padded([row.new_logps for row in rows], lambda: 1.0)
    trainer.model.eval()  # one micro-batch is the whole step
    trainer.policy_loss(trainer.model, scored).backward()
    rng = random.Random(0)
    for index, row in enumerate(rows):
        for t in rng.sample(range(len(row.ids)), min(4, len(row.ids))):
            numbers, losses = reference.new_blind[id(row)], []
            there = numbers[t]
            for step in (1e-5, -1e-5):
                numbers[t] = there + step
                losses.append(reference.policy_loss(rows))
            numbers[t] = there
            expected = (losses[0] - losses[1]) / 2e-5
            assert blind.grad[index, t].item() == pytest.approx(expected, abs=1e-8)
    assert blind.grad.abs().sum() > 0
