"""Policy losses that drop tokens outside of a trust region, next to loops over tokens."""

import math
import random

import pytest
import torch

from sapo_trl import Segments
from sapo_trl.losses import masked_policy_loss


LOW, HIGH = 0.3, 0.6  # of ratios
NARROW_LOW, NARROW_HIGH = 0.1, 0.2  # of probabilities


def case(seed: int) -> dict[str, torch.Tensor]:
    """Log-probabilities on all sides of both regions, and NaN in the padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 40)
    old = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(0.02, 0.98).log()
    drift = torch.randn(shape, generator=generator, dtype=torch.float64)
    logps = torch.minimum(old + drift, torch.full_like(old, -1e-3))
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[2] = False
    advantages = torch.randn(shape, generator=generator, dtype=torch.float64)
    for tensor in (logps, old, advantages):
        tensor[~mask] = math.nan
    return {"logps": logps.requires_grad_(), "old_logps": old, "advantages": advantages, "mask": mask}


def is_kept(trust_region: str, ratio: float, probability: float, old_probability: float, advantage: float) -> bool:
    if trust_region == "ratio":
        return 1 - LOW < ratio < 1 + HIGH
    if advantage > 0:
        return probability - old_probability <= NARROW_HIGH
    return probability - old_probability >= -NARROW_LOW


@pytest.mark.parametrize("trust_region", ["ratio", "probability"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop_over_tokens(trust_region, seed):
    batch = case(seed)
    total, weights, kinds, dropped = 0.0, torch.zeros_like(batch["old_logps"]), set(), [0, 0]
    for b, t in batch["mask"].nonzero().tolist():
        logp, old, a = (batch[name][b, t].item() for name in ("logps", "old_logps", "advantages"))
        ratio = math.exp(logp - old)
        keep = is_kept(trust_region, ratio, math.exp(logp), math.exp(old), a)
        kinds.add((keep, ratio > 1, a > 0))
        dropped[ratio > 1] += not keep
        weights[b, t] = ratio * a if keep else 0.0
        total -= weights[b, t].item()
    count = int(batch["mask"].sum())
    low, high = (LOW, HIGH) if trust_region == "ratio" else (NARROW_LOW, NARROW_HIGH)
    output = masked_policy_loss(**batch, low=low, high=high, trust_region=trust_region)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(total / count, abs=1e-12)
    # The form with a detached weight: -sum(w A logp) / count.
    assert torch.allclose(batch["logps"].grad, -weights / count, atol=1e-14, rtol=0)
    assert output.metrics["clip_fraction"].item() == pytest.approx(sum(dropped) / count)
    assert output.metrics["clip_fraction_low"].item() == pytest.approx(dropped[0] / count)
    assert output.metrics["clip_fraction_high"].item() == pytest.approx(dropped[1] / count)
    # Every kind of token that there is: a divergence counts in the advantage's direction alone.
    outside = {(up, positive) for keep, up, positive in kinds if not keep}
    both = {(up, positive) for up in (True, False) for positive in (True, False)}
    assert outside == (both if trust_region == "ratio" else {(True, True), (False, False)})


def test_the_ends_of_the_ratios_interval_are_outside():
    ratios = torch.tensor([[0.5, 0.5001, 1.9999, 2.0]], dtype=torch.float64)
    logps = ratios.log().requires_grad_()
    ones = torch.ones_like(ratios)
    masked_policy_loss(logps, torch.zeros_like(ones), ones, ones.bool(), low=0.5, high=1.0).loss.backward()
    assert (logps.grad != 0).tolist() == [[False, True, True, False]]


def test_a_segments_tokens_are_dropped_together():
    """The mean log-ratio of the first segment is inside, of the second outside, unlike single tokens."""
    log_ratios = torch.tensor([[0.9, -0.9, 0.1, 0.9]], dtype=torch.float64).requires_grad_()
    ones = torch.ones(1, 4, dtype=torch.float64)
    segments = Segments(torch.tensor([[0, 0, 1, 1]]))
    output = masked_policy_loss(log_ratios, 0 * ones, ones, ones.bool(), segments, low=LOW, high=HIGH)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(-2 / 4)
    assert log_ratios.grad.tolist() == [[-0.25, -0.25, 0.0, 0.0]]


def test_correction_weights_and_normalizer():
    batch, rng = case(0), random.Random(0)
    weights = torch.tensor([[rng.random() for _ in range(40)] for _ in range(4)], dtype=torch.float64)
    plain = masked_policy_loss(**batch, low=LOW, high=HIGH)
    weighted = masked_policy_loss(**batch, low=LOW, high=HIGH, weights=weights, normalizer=7.0)
    (one,) = torch.autograd.grad(plain.loss, batch["logps"])
    (other,) = torch.autograd.grad(weighted.loss, batch["logps"])
    count = batch["mask"].sum()
    assert torch.allclose(other * 7, one * count * weights, atol=1e-14)


def test_no_token_gives_no_loss():
    batch = case(0) | {"mask": torch.zeros(4, 40, dtype=torch.bool)}
    for trust_region in ("ratio", "probability"):
        output = masked_policy_loss(**batch, trust_region=trust_region)
        (gradient,) = torch.autograd.grad(output.loss, batch["logps"])
        assert output.loss.item() == 0.0 and not gradient.any()


def test_errors():
    batch = case(0)
    with pytest.raises(ValueError, match="`trust_region` must be one of"):
        masked_policy_loss(**batch, trust_region="kl")
    with pytest.raises(ValueError, match="needs each token's own ratio"):
        segments = Segments(torch.where(batch["mask"], 0, -1))
        masked_policy_loss(**batch, segments=segments, trust_region="probability")
