"""Masks of tokens, alone and together, with this package's losses and TRL's, against loops over tokens."""

import math

import pytest

from tests.trainer.preset_references.comparison import EXACT, Comparison, compare_losses, compare_rollout
from tests.trainer.preset_references.definitions import GroupRelative, SegmentAligned, clipped, log_ratio, mean
from tests.trainer.preset_references.made_up_trainer import TEXT_FAMILY, batch_of, record_of, trainer_of
from tests.trainer.preset_references.responses import Response, made_up_responses


MASKS = {
    "confident": {"confident_token_threshold": 0.6},
    "entropy": {"entropy_token_share": 0.3},
    "both": {"confident_token_threshold": 0.6, "entropy_token_share": 0.5},
}


def chosen_tokens(row: Response, settings: dict[str, float]) -> set[int]:
    """The tokens that pass every mask; each is a share of all of the response's tokens."""
    chosen = set(row.tokens)
    if "confident_token_threshold" in settings:
        chosen &= {t for t in row.tokens if math.exp(row.logps[t]) < settings["confident_token_threshold"]}
    if "entropy_token_share" in settings:
        count = math.ceil(settings["entropy_token_share"] * len(row.tokens) - 1e-9)
        chosen &= set(sorted(row.tokens, key=lambda t: (-row.entropies[t], t))[:count])
    return chosen


class MaskedSegmentAligned(SegmentAligned):
    """SAPO whose policy learns from some tokens. Ratios, values and returns are of all tokens."""

    def __init__(self, settings: dict[str, float]):
        super().__init__()
        self.settings = settings

    def rollout(self, rows: list[Response], value) -> None:
        super().rollout(rows, value)
        for row in rows:
            row.advantages = {t: a for t, a in row.advantages.items() if t in chosen_tokens(row, self.settings)}

    def policy_loss(self, rows: list[Response]) -> float:
        total = 0.0
        for row in rows:
            losses = []
            for t, a in row.advantages.items():
                ratio = math.exp(mean([log_ratio(row, s) for s in row.segment_of(t)]))
                losses.append(clipped(ratio, a))
            total += mean(losses) if losses else 0.0
        return total / len(rows)


class MaskedGroupRelative(GroupRelative):
    """GRPO and DAPO's loss as in TRL, over some tokens."""

    def __init__(self, settings: dict[str, float], kind: str, num_rows: int):
        super().__init__(kind)
        self.settings, self.num_rows = settings, num_rows

    def rollout(self, rows: list[Response], value) -> None:
        super().rollout(rows, value)
        for row in rows:
            row.advantages = {t: a for t, a in row.advantages.items() if t in chosen_tokens(row, self.settings)}
        self.num_tokens = sum(len(row.advantages) for row in rows)

    def policy_loss(self, rows: list[Response]) -> float:
        losses = [[clipped(math.exp(log_ratio(row, t)), a) for t, a in row.advantages.items()] for row in rows]
        if self.kind == "dapo":  # TRL divides by the rollout's tokens, in equal parts for its optimizer steps
            return sum(map(sum, losses)) / (self.num_tokens * len(rows) / self.num_rows)
        return mean([mean(of_row) if of_row else 0.0 for of_row in losses])


@TEXT_FAMILY
@pytest.mark.parametrize("masks", MASKS)
def test_with_a_critic(family, masks, tmp_path):
    trainer = trainer_of("sapo", family, tmp_path, **MASKS[masks])
    for seed in range(2):
        rows = made_up_responses(family.tokenizer, seed, holes=seed == 1)
        reference, compare = MaskedSegmentAligned(MASKS[masks]), Comparison(EXACT)
        scored = trainer.score_rollout(batch_of(rows, seed == 1, family.tokenizer.pad_token_id), record_of(rows))
        reference.rollout(rows, lambda row, t: row.values[t])
        assert any(0 < len(row.advantages) < len(row.tokens) for row in rows)
        compare_rollout(compare, scored, rows, with_targets=True)
        compare_losses(compare, trainer, reference, scored, rows, seed)


@TEXT_FAMILY
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_with_losses_of_trl(family, loss_type, masks, tmp_path):
    trainer = trainer_of("grpo", family, tmp_path, loss_type=loss_type, beta=0.0, **MASKS[masks])
    for seed in range(2):
        rows = made_up_responses(family.tokenizer, seed, 4, holes=seed == 1)
        reference, compare = MaskedGroupRelative(MASKS[masks], loss_type, len(rows)), Comparison(EXACT)
        reference.rollout(rows, None)
        batch = batch_of(rows, seed == 1, family.tokenizer.pad_token_id)
        del batch["ref_per_token_logps"]
        scored = trainer.score_rollout(batch, record_of(rows))
        compare_rollout(compare, scored, rows, with_targets=False)
        compare_losses(compare, trainer, reference, scored, rows, seed)
