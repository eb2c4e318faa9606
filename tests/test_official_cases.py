"""Inputs and outputs of the official SAPO functions (verl fork), float64."""

import json
from pathlib import Path

import pytest
import torch

from sapo_trl.advantages import masked_whiten, segment_gae
from sapo_trl.losses import clipped_policy_loss, segment_value_loss
from sapo_trl.segmentation import entropy_segments


CASES = json.loads((Path(__file__).parent / "sapo_official_cases.json").read_text())


@pytest.fixture(params=CASES, ids=lambda case: f"seed{case['seed']}")
def case(request):
    return request.param


def load(case):
    tensors = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in case.items()
        if isinstance(value, list) and name != "lengths"
    }
    length = tensors["entropies"].size(1)
    mask = torch.arange(length) < torch.tensor(case["lengths"]).unsqueeze(1)
    return tensors, mask, entropy_segments(tensors["entropies"], mask, case["topk_percent"])


def assert_equal(found, expected, mask, tolerance=1e-9):
    assert (found - expected)[mask].abs().max().item() < tolerance


def test_advantages_and_returns(case):
    tensors, mask, segments = load(case)
    advantages, returns = segment_gae(
        tensors["rewards"], tensors["values"], segments, case["gamma"], case["lam"], value_state="end"
    )
    assert_equal(returns, tensors["returns"], mask)
    # The official code adds 1e-8 to its denominators, which the whitened advantages feel.
    clamped = masked_whiten(advantages, mask).clamp(-case["adv_clamp"], case["adv_clamp"])
    assert_equal(clamped, tensors["advantages"], mask, tolerance=1e-7)


def test_policy_loss(case):
    tensors, mask, segments = load(case)
    logps = tensors["new_logps"].requires_grad_()
    out = clipped_policy_loss(
        logps,
        tensors["old_logps"],
        tensors["advantages"],
        mask,
        segments=segments,
        clip_low=case["clip_low"],
        clip_high=case["clip_high"],
        dual_clip=case["dual_clip"],
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(case["policy_loss"], abs=1e-9)
    assert_equal(logps.grad, tensors["policy_grad"], mask)
    assert logps.grad[~mask].eq(0).all()
    for name in ("clip_fraction", "approx_kl", "dual_clip_fraction"):
        assert out.metrics[name].item() == pytest.approx(case[name], abs=1e-9), name


def test_value_loss(case):
    tensors, mask, segments = load(case)
    value_preds = tensors["value_preds"].requires_grad_()
    out = segment_value_loss(
        value_preds,
        tensors["values"],
        tensors["returns"],
        segments,
        value_state="end",
        cliprange_value=case["value_clip"],
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(case["value_loss"], abs=1e-9)
    assert_equal(value_preds.grad, tensors["value_grad"], mask)
    assert out.metrics["value_clip_fraction"].item() == pytest.approx(case["value_clip_fraction"], abs=1e-9)
