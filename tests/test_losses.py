import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapo_trl import Segments
from sapo_trl.advantages import segment_gae
from sapo_trl.losses import (
    aggregate,
    clipped_policy_loss,
    segment_log_ratio,
    segment_value_loss,
    soft_adaptive_policy_loss,
)
from sapo_trl.segmentation import SequenceSegmenter, TokenSegmenter, entropy_segments
from tests.strategies import masks, noise, partitions, seeds, token_lists


AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def loop_policy_loss(logps, old_logps, advantages, segments, low, high, dual_clip, aggregation):
    """The definition, token by token; a segment's ratio is the geometric mean of its tokens' ratios."""
    rows = []
    for b, row in enumerate(token_lists(segments)):
        losses = []
        for tokens in row:
            ratio = math.prod(math.exp(logps[b, t] - old_logps[b, t]) for t in tokens) ** (1 / len(tokens))
            for t in tokens:
                a = advantages[b, t].item()
                loss = max(-ratio * a, -min(max(ratio, 1 - low), 1 + high) * a)
                if a < 0 and dual_clip is not None:
                    loss = min(loss, -dual_clip * a)
                losses.append(loss)
        rows.append(losses)
    tokens = sum(len(losses) for losses in rows)
    if aggregation == "token-mean":
        return sum(map(sum, rows)) / max(tokens, 1)
    if aggregation == "seq-mean-token-mean":
        return sum(sum(losses) / max(len(losses), 1) for losses in rows) / len(rows)
    if aggregation == "seq-mean-token-sum":
        return sum(map(sum, rows)) / len(rows)
    return sum(map(sum, rows)) / len(rows) / logps.size(1)


def inputs(segments, seed, scale=0.5):
    old_logps = -noise(segments.ids, seed).abs()
    logps = (old_logps + scale * noise(segments.ids, seed + 1)).requires_grad_()
    return logps, old_logps, noise(segments.ids, seed + 2)


@given(partitions(), seeds, st.sampled_from(AGGREGATIONS), st.sampled_from([None, 1.2, 3.0]))
def test_policy_loss_equals_the_definition(segments, seed, aggregation, dual_clip):
    logps, old_logps, advantages = inputs(segments, seed)
    out = clipped_policy_loss(logps, old_logps, advantages, segments.mask, segments, 0.2, 0.28, dual_clip, aggregation)
    expected = loop_policy_loss(logps.detach(), old_logps, advantages, segments, 0.2, 0.28, dual_clip, aggregation)
    assert out.loss.item() == pytest.approx(expected, abs=1e-9)


@given(partitions(), seeds, st.sampled_from([0.5, 1.0, 1.3]), st.sampled_from([0.7, 1.05]))
def test_soft_gate_equals_the_definition(segments, seed, temperature_pos, temperature_neg):
    """Each sign of the advantage has a temperature of its own."""
    logps, old_logps, advantages = inputs(segments, seed)
    rows = []
    for b, row in enumerate(token_lists(segments)):
        losses = []
        for tokens in row:
            ratio = math.prod(math.exp(logps[b, t] - old_logps[b, t]) for t in tokens) ** (1 / len(tokens))
            for t in tokens:
                a = advantages[b, t].item()
                tau = temperature_pos if a > 0 else temperature_neg
                losses.append(-a * 4 / tau / (1 + math.exp(-tau * (ratio - 1))))
        rows.append(sum(losses) / max(len(losses), 1))
    temperatures = (temperature_pos, temperature_neg)
    out = soft_adaptive_policy_loss(logps, old_logps, advantages, segments.mask, segments, *temperatures)
    assert out.loss.item() == pytest.approx(sum(rows) / len(rows), abs=1e-9)


@given(masks(), seeds)
def test_one_token_segments_give_the_token_ratio(mask, seed):
    segments = TokenSegmenter()(mask.double(), mask)
    logps, old_logps, advantages = inputs(segments, seed)
    with_segments = clipped_policy_loss(logps, old_logps, advantages, mask, segments)
    without = clipped_policy_loss(logps, old_logps, advantages, mask, segments=None)
    assert with_segments.loss.item() == pytest.approx(without.loss.item(), abs=1e-12)
    for name, value in without.metrics.items():
        assert with_segments.metrics[name].item() == pytest.approx(value.item(), abs=1e-12)


@given(masks(), seeds)
def test_one_segment_gives_gspos_ratio(mask, seed):
    """GSPO: (π(y) / π_old(y)) ** (1 / |y|), the same for every token of the response."""
    segments = SequenceSegmenter()(mask.double(), mask)
    logps, old_logps, _ = inputs(segments, seed)
    ratio = segment_log_ratio(logps, old_logps, segments).exp()
    for b in range(mask.size(0)):
        if mask[b].any():
            likelihood_ratio = (logps[b][mask[b]].sum() - old_logps[b][mask[b]].sum()).exp()
            gspo = likelihood_ratio ** (1 / int(mask[b].sum()))
            torch.testing.assert_close(ratio[b][mask[b]], gspo.expand(int(mask[b].sum())), rtol=1e-10, atol=0)


@given(partitions(), seeds)
def test_on_policy_gradients_of_segment_and_token_ratios_are_equal(segments, seed):
    """At the old policy, the 1/|segment| of the mean cancels against the segment's |segment| tokens."""
    old_logps = -noise(segments.ids, seed).abs()
    # One advantage per segment, as the segment GAE gives.
    advantages = segments.expand(segments.mean(noise(segments.ids, seed + 1)))
    gradients = []
    for partition in (segments, None):
        logps = old_logps.clone().requires_grad_()
        clipped_policy_loss(logps, old_logps, advantages, segments.mask, partition).loss.backward()
        gradients.append(logps.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


@given(partitions(max_rows=2, max_length=5), seeds)
def test_policy_gradient_equals_finite_differences(segments, seed):
    logps, old_logps, advantages = inputs(segments, seed, scale=0.05)  # inside the clip range, where it is smooth
    assert torch.autograd.gradcheck(
        lambda x: clipped_policy_loss(x, old_logps, advantages, segments.mask, segments).loss, logps
    )


def test_gradient_stops_where_it_should():
    mask = torch.ones(1, 4, dtype=torch.bool)
    # log-ratios: above the range with A > 0 (clipped), above with A < 0 (not), below with A < 0 (clipped), and beyond
    # the dual clip with A < 0 (clipped)
    log_ratio = torch.tensor([[0.5, 0.5, -0.5, 2.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, -1.0, -1.0]], dtype=torch.float64)
    logps = log_ratio.clone().requires_grad_()
    out = clipped_policy_loss(logps, torch.zeros_like(log_ratio), advantages, mask)
    out.loss.backward()
    assert (logps.grad != 0).tolist() == [[False, True, False, False]]
    assert out.metrics["clip_fraction_high"].item() == 0.25
    assert out.metrics["clip_fraction_low"].item() == 0.25
    assert out.metrics["clip_fraction"].item() == 0.5
    assert out.metrics["dual_clip_fraction"].item() == 0.25


@given(partitions(), seeds, st.sampled_from(AGGREGATIONS))
def test_what_is_outside_the_mask_does_not_matter(segments, seed, aggregation):
    logps, old_logps, advantages = inputs(segments, seed)
    mask = segments.mask
    dirty = [x.detach().masked_fill(~mask, torch.nan) for x in (logps, old_logps, advantages)]
    dirty[0].requires_grad_()
    loss = clipped_policy_loss(*dirty, mask, segments, aggregation=aggregation).loss
    clean = clipped_policy_loss(logps, old_logps, advantages, mask, segments, aggregation=aggregation).loss
    assert loss.item() == clean.item()
    loss.backward()
    assert dirty[0].grad.isfinite().all() and dirty[0].grad[~mask].eq(0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_all_masked_batch_gives_zero_loss_and_gradient(aggregation):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    segments = Segments.from_last_tokens(mask, mask)
    x = torch.full((2, 3), torch.nan, requires_grad=True)
    policy = clipped_policy_loss(x, x.detach(), x.detach(), mask, segments, aggregation=aggregation)
    value = segment_value_loss(x, x.detach(), x.detach(), segments, aggregation=aggregation)
    (policy.loss + value.loss).backward()
    assert policy.loss.item() == value.loss.item() == 0.0
    assert x.grad.eq(0).all()
    assert all(metric.isfinite() for metric in (*policy.metrics.values(), *value.metrics.values()))


@given(partitions(), seeds, st.sampled_from(AGGREGATIONS), st.integers(0, 4))
def test_with_the_whole_batchs_normalizer_parts_add_up_to_the_whole(segments, seed, aggregation, cut):
    x = noise(segments.ids, seed)
    mask = segments.mask
    rows = x.size(0)
    normalizer = {"token-mean": mask.sum().clamp(min=1), "seq-mean-token-sum-norm": x.numel()}.get(aggregation, rows)
    whole = aggregate(x, mask, aggregation)
    parts = [aggregate(x[part], mask[part], aggregation, normalizer) for part in (slice(0, cut), slice(cut, None))]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-12)


@given(partitions(), seeds)
def test_weights_multiply_token_losses(segments, seed):
    logps, old_logps, advantages = inputs(segments, seed)
    weights = noise(segments.ids[:, :1], seed + 3).abs()
    weighted = clipped_policy_loss(logps, old_logps, advantages, segments.mask, segments, weights=weights)
    # max, min and clip are positively homogeneous in the advantage, so a positive weight may go there instead.
    expected = clipped_policy_loss(logps, old_logps, advantages * weights, segments.mask, segments)
    assert weighted.loss.item() == pytest.approx(expected.loss.item(), abs=1e-12)


def test_targets_carry_no_gradient():
    """A critic's output may serve as value and as prediction: only the prediction learns."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    segments = TokenSegmenter()(mask.double(), mask)
    values = noise(mask, 0, requires_grad=True)
    advantages, returns = segment_gae(noise(mask, 1), values, segments)
    segment_value_loss(values, values, values + returns, segments, cliprange_value=None).loss.backward()
    expected = (values.detach() - (values.detach() + returns)) / 4
    torch.testing.assert_close(values.grad, expected)
    assert not advantages.requires_grad


def test_a_mask_within_the_segments_leaves_their_ratio_alone():
    everything = torch.ones(1, 4, dtype=torch.bool)
    segments = SequenceSegmenter()(everything.double(), everything)
    mask = torch.tensor([[1, 1, 0, 0]])  # int64, as TRL's masks are
    logps = torch.full((1, 4), 0.1, dtype=torch.float64)
    out = clipped_policy_loss(logps, torch.zeros_like(logps), torch.ones_like(logps), mask, segments)
    assert out.loss.item() == pytest.approx(-math.exp(0.1))
    assert out.metrics["ratio_mean"].item() == pytest.approx(math.exp(0.1))
    assert out.metrics["approx_kl"].item() == pytest.approx(-0.1)


def test_extreme_log_ratios_do_not_overflow():
    mask = torch.ones(1, 2, dtype=torch.bool)
    logps = torch.tensor([[0.0, -1e4]], requires_grad=True)
    out = clipped_policy_loss(logps, torch.tensor([[-1e4, 0.0]]), torch.tensor([[-1.0, 1.0]]), mask)
    out.loss.backward()
    assert out.loss.isfinite() and logps.grad.isfinite().all()


def test_half_precision_ratios_are_computed_in_float32():
    mask = torch.ones(1, 64, dtype=torch.bool)
    segments = SequenceSegmenter()(mask.float(), mask)
    logps = torch.full((1, 64), -1.0, dtype=torch.bfloat16)
    assert segment_log_ratio(logps, logps, segments).dtype == torch.float32


def loop_value_loss(value_preds, old_values, returns, segments, value_state, cliprange):
    losses = []
    for b, row in enumerate(token_lists(segments)):
        for tokens in row:
            t = tokens[0 if value_state == "start" else -1]
            v, old, target = value_preds[b, t].item(), old_values[b, t].item(), returns[b, t].item()
            loss = (v - target) ** 2
            if cliprange is not None:
                loss = max(loss, (min(max(v, old - cliprange), old + cliprange) - target) ** 2)
            losses.append(0.5 * loss)
    return sum(losses) / max(len(losses), 1)


@given(partitions(), seeds, st.sampled_from(["start", "end"]), st.sampled_from([None, 0.5]))
def test_value_loss_equals_the_definition(segments, seed, value_state, cliprange):
    value_preds, old_values, returns = (noise(segments.ids, seed + i) for i in range(3))
    out = segment_value_loss(value_preds, old_values, returns, segments, value_state, cliprange)
    expected = loop_value_loss(value_preds, old_values, returns, segments, value_state, cliprange)
    assert out.loss.item() == pytest.approx(expected, abs=1e-12)


@given(partitions(), seeds, st.sampled_from(["start", "end"]))
def test_value_gradient_reaches_one_state_per_segment(segments, seed, value_state):
    value_preds = noise(segments.ids, seed, requires_grad=True)
    returns = noise(segments.ids, seed + 1)
    segment_value_loss(value_preds, value_preds.detach(), returns, segments, value_state, None).loss.backward()
    state_mask = segments.is_first if value_state == "start" else segments.is_last
    assert torch.equal(value_preds.grad != 0, state_mask)


def test_golden_case():
    mask = torch.ones(1, 6, dtype=torch.bool)
    f64 = {"dtype": torch.float64}
    segments = entropy_segments(torch.tensor([[0.1, 2, 0.3, 0.2, 1.5, 0.05]], **f64), mask)
    values = torch.tensor([[0.5, 0.6, 0.4, 0.45, 0.7, 0.8]], **f64)
    rewards = torch.tensor([[0.0, 0, 0, 0, 0, 1]], **f64)
    advantages = torch.tensor([[1.104652] * 2 + [-0.218258] * 3 + [-1.554531]], **f64)
    change = torch.tensor([[0.1, -0.1, 0.2, 0.1, 0, -0.3]], **f64)
    old_logps = torch.full_like(change, -1.0)
    ratio = segment_log_ratio(old_logps + change, old_logps, segments).exp()[0].tolist()
    assert ratio == pytest.approx([1.0] * 2 + [1.105171] * 3 + [0.740818], abs=5e-7)
    out = clipped_policy_loss(old_logps + change, old_logps, advantages, mask, segments)
    assert out.loss.item() == pytest.approx(-0.040340, abs=1e-6)
    token = clipped_policy_loss(old_logps + change, old_logps, advantages, mask)
    assert token.loss.item() == pytest.approx(-0.041781, abs=1e-6)
    _, returns = segment_gae(rewards, values, segments, 1.0, 0.99, "end")
    value_preds = torch.tensor([[0.55, 0.9, 0.4, 0.5, 0.1, 0.95]], **f64)
    value = segment_value_loss(value_preds, values, returns, segments, "end", 0.5)
    assert value.loss.item() == pytest.approx(0.136322, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, m: clipped_policy_loss(x, x, x, m, dual_clip=1.0),
            r"`dual_clip` must be greater than 1 \(or `None`\), got 1.0",
        ),
        (lambda x, m: clipped_policy_loss(x, x, x, m, aggregation="mean"), r"`aggregation` must be one of .*'mean'"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
