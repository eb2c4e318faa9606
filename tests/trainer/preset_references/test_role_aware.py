"""SRPO against loops over tokens."""

import math
import random

import pytest
import torch

from sapo_trl.rollouts.types import PolicyForward
from tests.trainer.preset_references.comparison import EXACT, Comparison, compare_losses, compare_rollout
from tests.trainer.preset_references.definitions import GroupRelative, mean
from tests.trainer.preset_references.made_up_trainer import IMAGE_FAMILY, batch_of, padded, record_of, trainer_of
from tests.trainer.preset_references.responses import NUM_ROWS, Response, made_up_responses


class RoleAware(GroupRelative):
    """GRPO whose advantages are multiplied by the weights of perception and reasoning tokens."""

    def __init__(self):
        super().__init__("srpo", beta=0.01)

    @staticmethod
    def spans(row: Response) -> tuple[list[int], list[int]]:
        """Positions of the perception and of the reasoning, both empty if malformed."""
        text, starts = "", {}
        for t in row.tokens:
            starts[t] = len(text)
            text += row.texts[t]
        found = []
        for name in ("perception", "think"):
            opening, closing = f"<{name}>", f"</{name}>"
            if text.count(opening) != 1 or text.count(closing) != 1:
                return [], []
            first, last = text.index(opening) + len(opening), text.index(closing)
            found.append([t for t in row.tokens if first <= starts[t] < last])
        return found[0], found[1]

    def weigh(self, rows: list[Response], has_image: list[bool], corrupted: list, shortened: list) -> None:
        """`corrupted` and `shortened`: log-probabilities with a corrupted image, and without the perception."""
        for row, image, blind, without in zip(rows, has_image, corrupted, shortened, strict=True):
            perception, reasoning = self.spans(row) if image else ([], [])
            if not perception:
                continue
            z = {}
            for role, other in ((perception, blind), (reasoning, without)):
                scores = {t: row.logps[t] - other[t] for t in role}
                center = mean(list(scores.values()))
                std = math.sqrt(mean([(s - center) ** 2 for s in scores.values()]))
                z |= {t: s / (std + 1e-6) for t, s in scores.items()}
            baseline = mean(list(z.values()))
            weights = {t: math.exp(max(-1.0, min(1.0, z[t] - baseline))) for t in z}
            for t, weight in weights.items():
                row.advantages[t] *= weight / mean(list(weights.values()))


@IMAGE_FAMILY
@pytest.mark.parametrize("seed", range(3))
def test_role_aware_weights(family, seed, tmp_path):
    trainer = trainer_of("srpo", family, tmp_path)
    tokenizer, reference, compare = family.tokenizer, RoleAware(), Comparison(EXACT)
    good = "<perception>AB=3 and CD</perception><think>so {} it is</think>\\boxed{{4}}"
    texts = [
        *(good.format("x" * (seed + 2 * i)) for i in range(5)),
        "<perception>AB</perception> no more",
        "<perception>A</perception>" + good.format("twice"),
        "4",
    ]
    rows, rng = made_up_responses(tokenizer, seed, 4, texts=texts), random.Random(seed)
    if seed == 1:  # the policy wrote all but some of the reasoning
        for row in rows[:5]:
            reasoning = reference.spans(row)[1]
            row.kept = [t for t in row.kept if t not in reasoning[2:4]]
    has_image = [index != 3 for index in range(NUM_ROWS)]
    corrupted = [[logp + rng.gauss(0, 0.5) for logp in row.logps] for row in rows]
    shortened = [[logp + rng.gauss(0, 0.5) for logp in row.logps] for row in rows]
    remaining = [
        [t for t in range(len(row.ids)) if not image or t not in reference.spans(row)[0]]
        for row, image in zip(rows, has_image, strict=True)
    ]
    reference.rollout(rows, None)
    batch = batch_of(rows, seed == 1, tokenizer.pad_token_id)
    batch["pixel_values"] = torch.randn(
        4 * sum(has_image), 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(seed)
    )
    batch["image_grid_thw"] = torch.tensor([[1, 2, 2]] * sum(has_image))
    batch["num_images"] = [int(image) for image in has_image]
    seen = []

    def policy_forward(model, given, batch_size=None, frozen=False) -> PolicyForward:
        if "current_logps" in given:
            return PolicyForward(given["current_logps"], given["entropies"])
        logps = given["made_up_logps"]
        if not torch.equal(given["pixel_values"], batch["pixel_values"]):
            seen.append("corrupted")
            assert torch.equal(given["completion_ids"], batch["completion_ids"])
            logps = padded(corrupted, lambda: 9.0)
        elif not torch.equal(given["completion_ids"], batch["completion_ids"]):
            seen.append("shortened")
            logps = torch.full_like(logps, 9.0)
            for index, (row, positions) in enumerate(zip(rows, remaining, strict=True)):
                mask = given["completion_mask"][index].bool()
                assert given["completion_ids"][index][mask].tolist() == [row.ids[t] for t in positions]
                logps[index, : len(positions)] = torch.tensor(shortened[index], dtype=torch.float64)[positions]
        return PolicyForward(logps, given["entropies"])

    trainer.policy_forward = policy_forward
    scored = trainer.score_rollout(batch, record_of(rows))
    assert seen == ["corrupted", "shortened"]
    before = [dict(row.advantages) for row in rows]
    reference.weigh(rows, has_image, corrupted, shortened)
    assert any(row.advantages != advantages for row, advantages in zip(rows, before, strict=True))
    compare_rollout(compare, scored, rows, with_targets=False)
    for name in ("pixel_values", "image_grid_thw", "num_images"):
        del scored[name]
    compare_losses(compare, trainer, reference, scored, rows, seed)
