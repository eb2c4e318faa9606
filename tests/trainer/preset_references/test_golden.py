"""Golden values of single formulas."""

import math

import pytest
import torch

from sapo_trl import Segments
from sapo_trl.advantages import length_adaptive_lam, masked_whiten, segment_gae
from sapo_trl.critic.output import ValueOutput
from sapo_trl.losses import soft_adaptive_policy_loss
from sapo_trl.presets import preset_settings
from sapo_trl.rollouts import StateValues, TokenizedPrompts
from sapo_trl.segmentation import CutpointSegmenter
from tests.trainer.preset_references.made_up_trainer import (
    NUM_CONTINUATIONS,
    TEXT_FAMILY,
    batch_of,
    record_of,
    trainer_of,
)
from tests.trainer.preset_references.responses import Response


def test_golden_spo_chain():
    probabilities = torch.tensor([[0.95, 0.5, 0.99, 0.8, 0.3, 0.97, 0.85, 0.2]], dtype=torch.float64)
    mask = torch.ones(1, 8, dtype=torch.bool)
    segments = CutpointSegmenter(threshold=0.9, interval=2)(torch.zeros(1, 8), mask, probabilities.log())
    assert [t for t in range(1, 8) if segments.is_first[0, t]] == [1, 4, 7]
    # The first segment, which is confident, has no value of its own.
    values, rewards = torch.zeros(1, 8, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64)
    values[0, [1, 4, 7]] = torch.tensor([0.4, 0.6, 0.2], dtype=torch.float64)
    rewards[0, 7] = 1.0
    advantages, _ = segment_gae(rewards, values, segments, gamma=1.0, lam=0.0)
    learns = probabilities < 0.9
    advantages = torch.where(learns, advantages, 0)
    assert advantages[0].tolist() == pytest.approx([0, 0.2, 0, 0.2, -0.4, 0, -0.4, 0.8], abs=1e-12)
    whitened = masked_whiten(advantages, learns)[0].tolist()
    assert whitened == pytest.approx([0, 0.2390, 0, 0.2390, -0.9562, 0, -0.9562, 1.4343], abs=5e-5)


@TEXT_FAMILY
@pytest.mark.parametrize(
    ("text", "cap", "sampled", "expected"),
    [("a\nb\nc", None, [0.3, 0.6, 0.9], [0.3, 0.3, 0.1]), ("a\nb\nc\nd", 1, [0.3, 0.6], [0.3, 0.4, 0, 0])],
    ids=["three steps", "four steps, cap 1"],
)
def test_golden_vineppo(family, text, cap, sampled, expected, tmp_path):
    trainer = trainer_of("vineppo", family, tmp_path, max_valued_segments=cap, whiten_advantages=False)
    ids = family.tokenizer(text)["input_ids"]
    states = []

    class Sampler:
        def values_at(self, mask, completion_ids, num_continuations, truncated_reward=None) -> StateValues:
            assert num_continuations == NUM_CONTINUATIONS
            positions = mask.nonzero(as_tuple=True)[1].tolist()
            states.extend(family.tokenizer.decode(completion_ids[0, :position]) for position in positions)
            return StateValues(torch.tensor(sampled, dtype=torch.float64), torch.zeros(0), len(positions), 0, 0.0)

    trainer.continuation_sampler = lambda prompts, inputs, *_: Sampler()
    zeros = [0.0] * len(ids)
    row = Response([20], ids, [], list(range(len(ids))), 1.0, [-1.0] * len(ids), zeros, zeros, zeros, zeros, zeros)
    record = record_of([row], prompts=TokenizedPrompts([row.prompt]))
    scored = trainer.score_rollout(batch_of([row], False, family.tokenizer.pad_token_id), record)
    assert states == ["", "a\n", "a\nb\n"][: len(sampled)]
    lines = Segments(scored["segment_ids"]).is_first[0]
    assert scored["advantages"][0][lines].tolist() == pytest.approx(expected, abs=1e-12)


@TEXT_FAMILY
def test_golden_decoupled_gae_of_vc_ppo(family, tmp_path):
    trainer = trainer_of("vc_ppo", family, tmp_path, lam=0.5)
    segments = Segments(torch.tensor([[0, 1]]))
    rewards, values = torch.tensor([[[0.0, 1.0]], [[0.2, 0.5]]], dtype=torch.float64)
    advantages, targets = trainer.estimate_advantages(rewards, values, segments, {})
    assert advantages[0].tolist() == pytest.approx([0.55, 0.5], abs=1e-12)
    assert targets[0].tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


@pytest.mark.parametrize(("length", "expected"), [(100, 0.8), (1000, 0.98), (20, 0.0), (19, 0.0), (1, 0.0)])
def test_golden_lambda_of_vapo(length, expected):
    alpha = preset_settings("vapo")["length_adaptive_lam"]
    lam = length_adaptive_lam(Segments(torch.arange(length).unsqueeze(0)), alpha)
    assert lam.tolist() == [[pytest.approx(expected, abs=1e-7)]]


@pytest.mark.parametrize(
    ("preset", "length", "expected"),
    [("sao", 100, 0.9933333333), ("sao", 1, 0.3333333333), ("bpco", 4, 0.375), ("bpco", 40, 0.9375), ("bpco", 2, 0.0)],
)
def test_golden_lambda_of_single_rollouts(preset, length, expected):
    number = preset_settings(preset)["length_adaptive_lam"]
    lam = length_adaptive_lam(Segments(torch.arange(length).unsqueeze(0)), number)
    assert lam.tolist() == [[pytest.approx(expected, abs=1e-9)]]


def test_golden_values_of_bpco():
    low_high = preset_settings("bpco")["value_range"]
    outputs = torch.tensor([0.0, 1.0, -1.0, 1e9, -1e9], dtype=torch.float64)
    # atan(1) is pi / 4.
    assert ValueOutput(low_high)(outputs).tolist() == pytest.approx([0.5, 0.75, 0.25, 1.0, 0.0], abs=1e-9)


@pytest.mark.parametrize(
    ("advantage", "ratio", "gate"),
    [(1.0, 1.0, 2.0), (-1.0, 1.0, 1.904762), (1.0, 1.2, 2.199336), (-1.0, 1.2, 2.104030)],
)
def test_golden_soft_gate(advantage, ratio, gate):
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    output = soft_adaptive_policy_loss(logps, torch.zeros_like(logps), advantage * torch.ones_like(logps), mask)
    assert output.loss.item() == pytest.approx(-advantage * gate, abs=5e-7)


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope_of_gate"),
    [(1.0, 1.0, 1.0), (-1.0, 1.0, 1.0), (1.0, 2.0, 0.786448), (-1.0, 2.0, 0.768110)],
)
def test_golden_slope_of_soft_gate(advantage, ratio, slope_of_gate):
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    advantages = torch.full((1, 1), advantage, dtype=torch.float64)
    soft_adaptive_policy_loss(logps, torch.zeros(1, 1, dtype=torch.float64), advantages, mask).loss.backward()
    assert logps.grad.item() == pytest.approx(-advantage * ratio * slope_of_gate, abs=1e-6)
