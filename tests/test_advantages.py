import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapo_trl import Segments
from sapo_trl.advantages import (
    discounted_suffix_sum,
    length_adaptive_lam,
    masked_moments,
    masked_whiten,
    segment_gae,
)
from sapo_trl.segmentation import EntropySegmenter, TokenSegmenter, entropy_segments
from tests.strategies import masks, noise, partitions, seeds, token_lists


unit = st.floats(0, 1)


def loop_gae(rewards, values, segments, gamma, lam, value_state="start", critic_lam=None):
    """The definition, one segment at a time, backwards."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b, row in enumerate(token_lists(segments)):
        states = [tokens[0 if value_state == "start" else -1] for tokens in row]
        tail = target_tail = next_value = 0.0
        for tokens, state in zip(reversed(row), reversed(states), strict=True):
            value = values[b, state].item()
            delta = sum(rewards[b, t].item() for t in tokens) + gamma * next_value - value
            tail = delta + gamma * lam * tail
            target_tail = delta + gamma * (lam if critic_lam is None else critic_lam) * target_tail
            next_value = value
            advantages[b, tokens] = tail
            returns[b, tokens] = target_tail + value
    return advantages, returns


@given(partitions(), seeds, unit, unit, st.sampled_from(["start", "end"]), st.one_of(st.none(), unit))
def test_segment_gae_equals_the_definition(segments, seed, gamma, lam, value_state, critic_lam):
    rewards, values = noise(segments.ids, seed), noise(segments.ids, seed + 1)
    result = segment_gae(rewards, values, segments, gamma, lam, value_state, critic_lam)
    expected = loop_gae(rewards, values, segments, gamma, lam, value_state, critic_lam)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


@given(masks(), seeds, unit, unit)
def test_one_token_segments_make_it_ppo(mask, seed, gamma, lam):
    """PPO's backward recursion over the tokens of each row, holes left out."""
    rewards, values = noise(mask, seed), noise(mask, seed + 1)
    expected = torch.zeros_like(values)
    for b in range(mask.size(0)):
        tail = next_value = 0.0
        for t in reversed(mask[b].nonzero().flatten().tolist()):
            tail = (rewards[b, t] + gamma * next_value - values[b, t]) + gamma * lam * tail
            next_value = values[b, t]
            expected[b, t] = tail
    segments = TokenSegmenter()(values, mask)
    for value_state in ("start", "end"):
        advantages, returns = segment_gae(rewards, values, segments, gamma, lam, value_state)
        torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(returns, torch.where(mask, expected + values, 0), rtol=0, atol=1e-10)


@given(partitions(), seeds)
def test_without_discounting_the_advantage_is_return_minus_value(segments, seed):
    """γ = λ = 1 with an outcome reward: A = R − V(start of the segment)."""
    outcome = noise(segments.ids[:, 0], seed)
    rewards = torch.zeros_like(segments.ids, dtype=torch.float64)
    for b, row in enumerate(token_lists(segments)):
        if row:
            rewards[b, row[-1][-1]] = outcome[b]
    values = noise(segments.ids, seed + 1)
    advantages, returns = segment_gae(rewards, values, segments, gamma=1.0, lam=1.0)
    for b, row in enumerate(token_lists(segments)):
        for tokens in row:
            for t in tokens:
                torch.testing.assert_close(advantages[b, t], outcome[b] - values[b, tokens[0]], rtol=0, atol=1e-10)
                torch.testing.assert_close(returns[b, t], outcome[b], rtol=0, atol=1e-10)


@given(partitions(), seeds)
def test_padding_and_batch_order_change_nothing(segments, seed):
    rewards, values = noise(segments.ids, seed), noise(segments.ids, seed + 1)
    advantages, returns = segment_gae(rewards, values, segments)
    order = torch.randperm(rewards.size(0))
    permuted = segment_gae(rewards[order], values[order], Segments(segments.ids[order]))
    torch.testing.assert_close(permuted, (advantages[order], returns[order]), rtol=0, atol=1e-12)
    pad = torch.full((rewards.size(0), 4), torch.nan, dtype=torch.float64)
    padded_segments = Segments(torch.cat([segments.ids, torch.full(pad.shape, -1)], 1))
    padded = segment_gae(torch.cat([rewards, pad], 1), torch.cat([values, pad], 1), padded_segments)
    length = rewards.size(1)
    torch.testing.assert_close(padded[0][:, :length], advantages, rtol=0, atol=1e-12)
    torch.testing.assert_close(padded[1][:, :length], returns, rtol=0, atol=1e-12)
    assert padded[0][:, length:].eq(0).all()


@given(partitions())
def test_holes_between_tokens_change_nothing(segments):
    """Removing the masked-out positions of a single row and computing on what is left gives the same numbers."""
    rewards, values = noise(segments.ids, 1), noise(segments.ids, 2)
    for b in range(segments.ids.size(0)):
        keep = segments.mask[b]
        row = segment_gae(rewards[b : b + 1], values[b : b + 1], Segments(segments.ids[b : b + 1]))[0][0]
        packed_segments = Segments(segments.ids[b : b + 1, keep])
        packed = segment_gae(rewards[b : b + 1, keep], values[b : b + 1, keep], packed_segments)[0][0]
        torch.testing.assert_close(row[keep], packed, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("value_state", "expected_advantages", "expected_returns"),
    [
        ("end", [0.39502, 0.298, 0.2], [0.99502, 0.998, 1.0]),
        ("start", [0.49202, 0.598, 0.2], [0.99202, 0.998, 1.0]),
    ],
)
def test_golden_case(value_state, expected_advantages, expected_returns):
    mask = torch.ones(1, 6, dtype=torch.bool)
    entropies = torch.tensor([[0.1, 2, 0.3, 0.2, 1.5, 0.05]], dtype=torch.float64)
    values = torch.tensor([[0.5, 0.6, 0.4, 0.45, 0.7, 0.8]], dtype=torch.float64)
    rewards = torch.tensor([[0.0, 0, 0, 0, 0, 1]], dtype=torch.float64)
    segments = entropy_segments(entropies, mask)
    advantages, returns = segment_gae(rewards, values, segments, 1.0, 0.99, value_state)
    for found, expected in ((advantages, expected_advantages), (returns, expected_returns)):
        assert found[0].tolist() == pytest.approx([expected[0]] * 2 + [expected[1]] * 3 + [expected[2]], abs=1e-12)
    if value_state == "end":
        whitened = masked_whiten(advantages, mask)[0].tolist()
        assert whitened == pytest.approx([1.104652] * 2 + [-0.218258] * 3 + [-1.554531], abs=5e-7)


def test_golden_case_of_decoupled_gae():
    mask = torch.ones(1, 2, dtype=torch.bool)
    segments = TokenSegmenter()(mask.float(), mask)
    advantages, returns = segment_gae(
        torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2, 0.5]]), segments, gamma=1.0, lam=0.5, critic_lam=1.0
    )
    assert advantages[0].tolist() == pytest.approx([0.55, 0.5])
    assert returns[0].tolist() == pytest.approx([1.0, 1.0])


@given(partitions(), st.sampled_from([0.05, 0.3, 1.0, 10.0]))
def test_length_adaptive_lam_equals_the_definition(segments, alpha):
    """Short responses, for which the published formula is negative, included."""
    expected = [max(0.0, 1 - 1 / (alpha * max(len(row), 1))) for row in token_lists(segments)]
    assert length_adaptive_lam(segments, alpha).squeeze(1).tolist() == pytest.approx(expected)


@given(partitions(), st.sampled_from([0.01, 0.5, 0.9, 1.0]))
def test_a_root_leaves_the_same_share_of_every_response(segments, share):
    lam = length_adaptive_lam(segments, share, "root").squeeze(1)
    for row, own in zip(token_lists(segments), lam.tolist(), strict=True):
        assert own ** max(len(row), 1) == pytest.approx(share)


def test_both_rules_agree_on_long_responses():
    """JustRL-II's first form was 1 - 1 / (1.5 l), which is the root of exp(-1 / 1.5)."""
    segments = Segments(torch.arange(1000).unsqueeze(0))
    one, other = length_adaptive_lam(segments, 1.5), length_adaptive_lam(segments, math.exp(-1 / 1.5), "root")
    assert one.item() == pytest.approx(other.item(), abs=1e-6)
    assert one.item() != other.item()


@pytest.mark.parametrize(("number", "rule"), [(0.0, "reciprocal"), (0.0, "root"), (1.5, "root")])
def test_numbers_without_a_lam_are_errors(number, rule):
    with pytest.raises(ValueError, match="`number` must be positive, and at most 1 with"):
        length_adaptive_lam(Segments(torch.zeros(1, 3, dtype=torch.long)), number, rule)


@pytest.mark.parametrize("discount", [0.0, 1e-3, 0.5, 0.95, 1.0])
def test_long_suffix_sums_neither_underflow_nor_lose_precision(discount):
    """4,096 steps: 0.5**4096 underflows, which a cumulative sum divided by powers of the discount turns into NaN."""
    x = noise(torch.zeros(2, 4096), 0)
    expected, tail = torch.zeros_like(x), torch.zeros(2, dtype=torch.float64)
    for m in range(x.size(1) - 1, -1, -1):
        tail = x[:, m] + discount * tail
        expected[:, m] = tail
    torch.testing.assert_close(discounted_suffix_sum(x, discount), expected, rtol=1e-12, atol=1e-11)


def test_discount_per_row():
    x, discount = noise(torch.zeros(3, 9), 0), torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)
    expected = torch.cat([discounted_suffix_sum(x[b : b + 1], discount[b].item()) for b in range(3)])
    torch.testing.assert_close(discounted_suffix_sum(x, discount), expected)


def test_bf16_values_are_promoted():
    mask = torch.ones(1, 512, dtype=torch.bool)
    values = torch.linspace(0, 1, 512).bfloat16().unsqueeze(0)
    segments = EntropySegmenter()(torch.rand(1, 512), mask)
    advantages, returns = segment_gae(torch.zeros(1, 512).bfloat16(), values, segments)
    exact, _ = segment_gae(torch.zeros(1, 512).double(), values.double(), segments)
    assert advantages.dtype == returns.dtype == torch.float32
    torch.testing.assert_close(advantages.double(), exact, rtol=1e-5, atol=1e-6)


@given(masks(), seeds)
def test_whitening(mask, seed):
    x = noise(mask, seed).mul(3).add(1000).masked_fill(~mask, torch.nan)
    whitened = masked_whiten(x, mask)
    kept = whitened[mask]
    assert whitened[~mask].eq(0).all()
    if kept.numel() < 2:
        assert kept.eq(0).all()
        return
    reference = (x[mask] - x[mask].mean()) / (x[mask].var() + 1e-8).sqrt()
    torch.testing.assert_close(kept, reference, rtol=0, atol=1e-9)


def test_whitening_equal_values_gives_zeros():
    x = torch.full((2, 3), 0.7)
    assert masked_whiten(x, torch.ones(2, 3, dtype=torch.bool)).abs().max() < 1e-3


@given(masks(max_rows=4), seeds, st.integers(0, 4))
def test_moments_over_processes_equal_those_of_the_whole(mask, seed, cut):
    """Two processes, played one after the other: the sums each would contribute are recorded, then exchanged."""
    x = noise(mask, seed)
    parts = [(x[:cut], mask[:cut]), (x[cut:], mask[cut:])]

    def run(part, exchange):
        calls = []

        def reduce(tensor):
            calls.append(tensor)
            return exchange(len(calls) - 1, tensor)

        return masked_moments(*part, reduce), calls

    # Round 1 exchanges the first sums, round 2 the squared deviations that depend on them.
    first = [run(part, lambda index, tensor: tensor)[1][0] for part in parts]
    second = [run(part, lambda index, tensor: sum(first) if index == 0 else tensor)[1][1] for part in parts]
    totals = [sum(first), sum(second)]
    mean, variance = run(parts[0], lambda index, tensor: totals[index])[0]
    whole_mean, whole_variance = masked_moments(x, mask)
    torch.testing.assert_close(mean, whole_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(variance, whole_variance, rtol=0, atol=1e-12)


@pytest.mark.parametrize("setting", [{"gamma": 1.01}, {"lam": -0.1}, {"critic_lam": 2.0}, {"lam": float("nan")}])
def test_coefficients_out_of_range(setting):
    segments = Segments(torch.zeros(1, 1, dtype=torch.int64))
    name, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=rf"`{name}` must lie in \[0, 1\], got {value}"):
        segment_gae(torch.zeros(1, 1), torch.zeros(1, 1), segments, **setting)
