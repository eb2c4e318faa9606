import math
import re
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_trl.embedded import build_tokenizer
from sapo_trl.role_aware import (
    PERCEPTION_PATTERN,
    REASONING_PATTERN,
    RoleAwareWeighting,
    image_contrast,
    perception_consistency,
    remove_span,
    role_aware_weights,
    role_means,
    role_spans,
)
from tests.strategies import masks, noise, seeds


few = settings(max_examples=50)


cached_tokenizer = lru_cache(build_tokenizer)


@pytest.fixture(scope="module")
def tokenizer():
    return cached_tokenizer()


@st.composite
def roles(draw, max_rows=3, max_length=8):
    """Two disjoint bool (B, T) masks, with rows of one role, of one token, of none."""
    rows = draw(st.integers(1, max_rows))
    length = draw(st.integers(1, max_length))
    roles = draw(st.lists(st.integers(0, 2), min_size=rows * length, max_size=rows * length))
    roles = torch.tensor(roles).view(rows, length)
    return roles == 1, roles == 2


def loop_weights(perception_scores, reasoning_scores, perception, reasoning, temperature, clip, eps=1e-6):
    """The definition, token by token."""
    result = []
    for b in range(perception.size(0)):
        z, neutral = {}, []
        for scores, role in ((perception_scores, perception), (reasoning_scores, reasoning)):
            s = {t: scores[b, t].item() for t in range(role.size(1)) if role[b, t]}
            if not s:
                continue
            mean = math.fsum(s.values()) / len(s)
            std = math.sqrt(math.fsum((v - mean) ** 2 for v in s.values()) / len(s))
            rms = math.sqrt(math.fsum(v**2 for v in s.values()) / len(s))
            if std <= eps * max(1.0, rms):
                neutral += list(s)
            else:
                z.update({t: v / (std + eps) for t, v in s.items()})
        baseline = math.fsum(z.values()) / len(z) if z else 0.0
        z.update(dict.fromkeys(neutral, baseline))
        # With the neutral tokens at the baseline, the baseline is the mean over all tokens of both roles.
        if z:
            assert math.isclose(math.fsum(z.values()) / len(z), baseline, abs_tol=1e-9)
        w = {t: math.exp(max(-clip, min(clip, (v - baseline) / temperature))) for t, v in z.items()}
        mean = math.fsum(w.values()) / len(w) if w else 1.0
        result.append([w[t] / mean if t in w else 1.0 for t in range(perception.size(1))])
    return torch.tensor(result, dtype=torch.float64)


@few
@given(roles(), seeds, st.sampled_from([0.3, 1.0, 4.0]), st.sampled_from([0.2, 1.0, 3.0]), st.booleans())
def test_weights_equal_the_definition(spans, seed, temperature, clip, rounded):
    perception, reasoning = spans
    perception_scores, reasoning_scores = noise(perception, seed), 3 + noise(perception, seed + 1)
    if rounded:  # many constant roles
        perception_scores, reasoning_scores = perception_scores.round(), reasoning_scores.round()
    weights = role_aware_weights(perception_scores, reasoning_scores, perception, reasoning, temperature, clip)
    expected = loop_weights(perception_scores, reasoning_scores, perception, reasoning, temperature, clip)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-9)


@few
@given(roles(), seeds, st.sampled_from([1e-3, 1.0, 1e4]))
def test_weights_are_positive_and_average_one(spans, seed, scale):
    perception, reasoning = spans
    scores = scale * noise(perception, seed)
    weights = role_aware_weights(scores.float(), scores.flip(1).float(), perception, reasoning, clip=2.0)
    assert weights.dtype == torch.float32
    assert (weights > 0).all()
    spans = perception | reasoning
    assert (weights[~spans] == 1).all()
    for row, span in zip(weights.double(), spans, strict=True):
        if span.any():
            assert abs(row[span].mean().item() - 1) < 1e-6
            assert row[span].max() / row[span].min() <= math.exp(4) * (1 + 1e-5)


@few
@given(roles(), st.sampled_from([0.0, -3.7, 1e-9, 1e5]), st.sampled_from([0.0, 0.1, 250.0]))
def test_scores_that_do_not_vary_give_a_weight_of_one(spans, perception_score, reasoning_score):
    perception, reasoning = spans
    ones = torch.ones(perception.shape)
    weights = role_aware_weights(perception_score * ones, reasoning_score * ones, perception, reasoning)
    assert torch.equal(weights, ones)


@few
@given(roles(), seeds, st.sampled_from([0.0, 1.0, 1e4]))
def test_rounding_errors_do_not_count_as_variation(spans, seed, level):
    perception, reasoning = spans
    scores = level + 1e-7 * max(level, 1.0) * noise(perception, seed).clamp(-3, 3)
    assert (role_aware_weights(scores, -scores, perception, reasoning) == 1).all()


@few
@given(roles(), seeds, st.sampled_from([0.5, 8.0, 100.0]), st.sampled_from([0.5, 8.0]))
def test_the_unit_of_each_role_does_not_matter(spans, seed, perception_unit, reasoning_unit):
    perception, reasoning = spans
    one, other = noise(perception, seed), noise(perception, seed + 1)
    expected = role_aware_weights(one, other, perception, reasoning, eps=1e-12)
    scaled = role_aware_weights(perception_unit * one, reasoning_unit * other, perception, reasoning, eps=1e-12)
    torch.testing.assert_close(scaled, expected, rtol=1e-7, atol=1e-7)


@few
@given(roles(), seeds)
def test_rows_and_padding_do_not_matter(spans, seed):
    perception, reasoning = spans
    one, other = noise(perception, seed), noise(perception, seed + 1)
    expected = role_aware_weights(one, other, perception, reasoning)
    for b in range(perception.size(0)):
        row = slice(b, b + 1)
        alone = role_aware_weights(one[row], other[row], perception[row], reasoning[row])
        torch.testing.assert_close(alone, expected[row])
    nan = torch.full((perception.size(0), 2), torch.nan, dtype=torch.float64)
    off = torch.zeros(nan.shape, dtype=torch.bool)
    # Scores of one role may be undefined at the tokens of the other.
    padded = role_aware_weights(
        torch.cat([one.masked_fill(~perception, torch.nan), nan], 1),
        torch.cat([other.masked_fill(~reasoning, torch.nan), nan], 1),
        torch.cat([perception, off], 1),
        torch.cat([reasoning, off], 1),
    )
    torch.testing.assert_close(padded[:, :-2], expected)
    assert (padded[:, -2:] == 1).all()


def test_higher_scores_weigh_more_and_carry_no_gradient():
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.5, 0.7, 0.6]], requires_grad=True)
    perception = torch.tensor([[True, True, True, False, False, False]])
    weights = role_aware_weights(scores, scores, perception, ~perception, temperature=5.0)
    assert not weights.requires_grad
    assert weights[0, :3].argsort().tolist() == [1, 2, 0]
    assert weights[0, 3:].argsort().tolist() == [0, 2, 1]


def test_a_span_of_one_token_does_not_decide_the_baseline():
    scores = torch.tensor([[7.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    perception = torch.tensor([[True, False, False, False]])
    weights = role_aware_weights(scores, scores, perception, ~perception)
    # z of the others is s / sqrt(2 / 3), their mean 2 / sqrt(2 / 3): exponents 0, -1, 0, 1 after the clip.
    exponents = [0.0, -1.0, 0.0, 1.0]
    total = sum(math.exp(x) for x in exponents)
    expected = torch.tensor([[4 * math.exp(x) / total for x in exponents]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)


def test_a_large_clip_does_not_overflow():
    scores = torch.tensor([[0.0, 1e-3, 900.0, 901.0]])
    perception = torch.tensor([[True, True, False, False]])
    weights = role_aware_weights(scores, scores, perception, ~perception, temperature=1e-3, clip=1e4)
    assert weights.isfinite().all()


def test_weights_of_half_precision_scores_and_of_nothing():
    perception = torch.tensor([[True, False]])
    weights = role_aware_weights(torch.ones(1, 2).bfloat16(), torch.ones(1, 2).bfloat16(), perception, ~perception)
    assert weights.dtype == torch.float32
    for shape in ((0, 3), (2, 0)):
        empty, off = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        assert role_aware_weights(empty, empty, off, off).shape == shape
        assert role_means(empty, off, off)["role/well_formed"][1] == shape[0]


def test_contrasts():
    logps = torch.tensor([[-1.0, -2.0]], dtype=torch.bfloat16, requires_grad=True)
    other = torch.tensor([[-1.5, -0.25]])
    for score in (image_contrast, perception_consistency):
        result = score(logps, other)
        assert result.dtype == torch.float32 and not result.requires_grad
        assert result.tolist() == [[0.5, -1.75]]


def test_role_means_are_sums_and_counts():
    weights = torch.tensor([[2.0, 0.5, 0.5, 1.0], [1.0, 1.0, 1.0, torch.nan]])
    perception = torch.tensor([[True, False, False, False], [False] * 4])
    reasoning = torch.tensor([[False, True, True, False], [False] * 4])
    means = {
        name: (total.item(), count.item())
        for name, (total, count) in role_means(weights, perception, reasoning).items()
    }
    assert means == {
        "role/perception_weight": (2.0, 1),
        "role/reasoning_weight": (1.0, 2),
        "role/well_formed": (1.0, 2),
    }


WELL_FORMED = "<perception>A=3,\nB=4</perception>\n<think>3+4=7</think>\\boxed{7}"


def encode(texts, tokenizer, pad=0):
    ids = [tokenizer(text)["input_ids"] for text in texts]
    length = max(map(len, ids)) + pad
    rows = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in ids]
    mask = [[True] * len(row) + [False] * (length - len(row)) for row in ids]
    return torch.tensor(rows), torch.tensor(mask)


def text_of(ids, where, tokenizer):
    return "".join(tokenizer.decode([token]) for token in ids[where].tolist())


def loop_spans(ids, mask, tokenizer, patterns):
    """For each row the positions of each span's tokens, character by character."""
    result = []
    for row, keep in zip(ids.tolist(), mask.tolist(), strict=True):
        text, first_character = "", {}
        for t, token in enumerate(row):
            if keep[t]:
                first_character[t] = len(text)
                text += tokenizer.decode([token])
        found = [[(m.start(1), m.end(1)) for m in re.finditer(p, text, re.DOTALL)] for p in patterns]
        tokens = [[], []]
        if [len(matches) for matches in found] == [1, 1]:
            (a, b), (c, d) = found[0][0], found[1][0]
            if not set(range(a, b)) & set(range(c, d)):
                tokens = [[t for t, i in first_character.items() if i in range(*m[0])] for m in found]
        result.append(tokens if all(tokens) else [[], []])
    return result


fragments = st.lists(
    st.sampled_from(["<perception>", "</perception>", "<think>", "</think>", "A=3", "\n", "7-3=4", "Ωx", " so "]),
    max_size=8,
).map("".join)


@few
@given(
    st.lists(fragments | st.just(WELL_FORMED) | fragments.map(WELL_FORMED.__add__), min_size=1, max_size=3), st.data()
)
def test_role_spans_equal_the_definition(texts, data):
    tokenizer = cached_tokenizer()
    ids, mask = encode(texts, tokenizer, pad=1)
    dropped = data.draw(st.sets(st.integers(0, ids.numel() - 1), max_size=2))
    mask.view(-1)[sorted(dropped)] = False
    found = role_spans(ids, mask, tokenizer)
    expected = loop_spans(ids, mask, tokenizer, (PERCEPTION_PATTERN, REASONING_PATTERN))
    for b, row in enumerate(expected):
        assert [role[b].nonzero().flatten().tolist() for role in found] == row


def test_spans_are_the_text_between_the_tags(tokenizer):
    ids, mask = encode([WELL_FORMED], tokenizer, pad=3)
    perception, reasoning = role_spans(ids, mask, tokenizer)
    assert perception.dtype == reasoning.dtype == torch.bool
    # A token whose first character is in the span is of the span, even if it reaches into the tag after it.
    assert re.fullmatch(r"A=3,\nB=4(</?)?", text_of(ids, perception, tokenizer))
    assert re.fullmatch(r"3\+4=7(</?)?", text_of(ids, reasoning, tokenizer))
    assert not (perception | reasoning)[~mask].any()


@pytest.mark.parametrize(
    "text",
    [
        "7-3=4",
        "<perception>A=3</perception> so 7",
        "<think>A=3</think> so 7",
        "<perception>A=3</perception><perception>B=4</perception><think>7</think>",
        "<perception>A=3</perception><think>7</think><think>8</think>",
        "<perception></perception><think>7</think>",
        "<perception>A=3</perception><think></think>",
        "<perception>A=3<think>7</perception></think>",
        "<perception><think>7</think></perception>",
        "<perception>A=3<think>7</think>",
    ],
)
def test_malformed_rows_have_no_spans(text, tokenizer):
    ids, mask = encode([text, WELL_FORMED], tokenizer)
    perception, reasoning = role_spans(ids, mask, tokenizer)
    assert perception.any(1).tolist() == reasoning.any(1).tolist() == [False, True]


def test_spans_skip_holes(tokenizer):
    # The tool's output closes the perception span a second time; as a hole it is not read.
    before, tool, after = "<perception>A=3", "</perception>", "B=4</perception><think>7</think>"
    parts = [tokenizer(part)["input_ids"] for part in (before, tool, after)]
    ids = torch.tensor([sum(parts, [])])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, len(parts[0]) : len(parts[0]) + len(parts[1])] = False
    perception, _ = role_spans(ids, mask, tokenizer)
    assert text_of(ids, perception, tokenizer).startswith("A=3B=4")
    assert not perception[~mask].any()


def test_spans_of_other_patterns(tokenizer):
    ids, mask = encode(["A=3 so 7-3=4", "7-3=4"], tokenizer)
    perception, reasoning = role_spans(ids, mask, tokenizer, r"A=\d", r"(?:7)(-3)|(x)")
    assert text_of(ids, perception, tokenizer).startswith("A=3")
    assert text_of(ids, reasoning, tokenizer).startswith("-3")
    # A group that took no part in the match is no span.
    perception, reasoning = role_spans(ids, mask, tokenizer, r"A=\d", r"(x)|-3")
    assert not perception.any() and not reasoning.any()


def test_spans_of_no_rows_and_of_ids_beyond_the_vocabulary(tokenizer):
    empty = torch.zeros(0, 4, dtype=torch.int64)
    assert all(role.shape == (0, 4) for role in role_spans(empty, empty.bool(), tokenizer))
    ids, mask = encode([WELL_FORMED], tokenizer)
    perception, reasoning = role_spans(ids, mask, tokenizer)
    middle = int(perception[0].nonzero()[1])  # of the perception span
    strange = torch.cat([ids[:, :middle], torch.tensor([[len(tokenizer) + 7]]), ids[:, middle:]], dim=1)
    spans = role_spans(strange, torch.ones_like(strange, dtype=torch.bool), tokenizer)
    assert [role.sum() for role in spans] == [perception.sum(), reasoning.sum()]
    assert not any(role[0, middle] for role in spans)


def patches(counts, features=5, seed=0):
    return noise(torch.empty(sum(counts), features), seed)


@few
@given(masks(max_length=10), st.data(), seeds)
def test_remove_span_equals_lists(mask, data, seed):
    bits = data.draw(st.lists(st.booleans(), min_size=mask.numel(), max_size=mask.numel()))
    span = torch.tensor(bits).view_as(mask)
    ids = noise(mask, seed).mul(100).long()
    before = ids.clone()
    new_ids, new_mask, source = remove_span(ids, mask.long(), span, pad_id=777)
    assert torch.equal(ids, before)
    assert new_mask.dtype == torch.int64 and new_ids.shape == new_mask.shape == source.shape == ids.shape
    gathered = new_ids.gather(1, source)
    for b in range(mask.size(0)):
        kept = [t for t in range(mask.size(1)) if mask[b, t] and not span[b, t]]
        padding = mask.size(1) - len(kept)
        assert new_ids[b].tolist() == [ids[b, t].item() for t in kept] + [777] * padding
        assert new_mask[b].tolist() == [1] * len(kept) + [0] * padding
        assert [source[b, t].item() for t in kept] == list(range(len(kept)))
        assert [gathered[b, t].item() for t in kept] == [ids[b, t].item() for t in kept]


class Policy:
    """Log-probabilities that depend on the row's pixels and on the tokens read so far; keeps what it was given."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append(batch)
        counts = [0] * len(batch["num_images"])
        grids = batch["image_grid_thw"].tolist()
        rows = [row for row, images in enumerate(batch["num_images"]) for _ in range(images)]
        for row, (t, h, w) in zip(rows, grids, strict=True):
            counts[row] += t * h * w
        steps = torch.arange(1, batch["pixel_values"].size(1) + 1, dtype=torch.float64)
        image = [
            (pixels.square() @ steps).mean().item() if len(pixels) else 0.0
            for pixels in batch["pixel_values"].split(counts)
        ]
        logps = torch.zeros(batch["completion_ids"].shape, dtype=torch.float64)
        for b, (ids, keep) in enumerate(
            zip(batch["completion_ids"].tolist(), batch["completion_mask"].tolist(), strict=True)
        ):
            state = image[b]
            for t, token in enumerate(ids):
                if keep[t]:
                    state = 0.7 * state + math.sin(token)
                    logps[b, t] = -abs(state) - 0.1 * math.cos(3 * state + token)
        return logps


@pytest.fixture
def rollout(tokenizer):
    """Four rows: two images, malformed, without an image, one image."""
    texts = [WELL_FORMED, "7-3=4", WELL_FORMED, "<perception>so A=7</perception>\n<think>7-3=4 Step</think>"]
    ids, mask = encode(texts, tokenizer, pad=2)
    grid = torch.tensor([[1, 2, 2], [1, 4, 2], [1, 2, 6], [1, 4, 4]])
    batch = {
        "prompt_ids": torch.full((4, 3), 5),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "pixel_values": patches([12, 12, 0, 16]),
        "image_grid_thw": grid,
        "num_images": [2, 1, 0, 1],
        "mm_token_type_ids": torch.zeros(4, 3 + ids.size(1), dtype=torch.int64),
    }
    corrupted = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    policy = Policy()
    arguments = {
        "batch": batch,
        "completion_ids": ids,
        "mask": mask,
        "logps": policy(batch),
        "tokenizer": tokenizer,
        "logps_corrupted": lambda: policy(corrupted),
        "forward": policy,
        "pad_id": 7,
    }
    policy.batches.clear()
    return arguments


def test_two_forwards_that_differ_from_the_batch_in_one_thing_each(rollout):
    batch, policy = rollout["batch"], rollout["forward"]
    kept = {name: value.clone() if torch.is_tensor(value) else list(value) for name, value in batch.items()}
    weights, metrics = RoleAwareWeighting()(**rollout)

    assert batch.keys() == kept.keys()
    assert all(torch.equal(batch[k], v) if torch.is_tensor(v) else batch[k] == v for k, v in kept.items())
    assert len(policy.batches) == 2
    corrupted, shortened = policy.batches
    assert {k for k in batch if corrupted[k] is not batch[k]} == {"pixel_values"}
    assert {k for k in batch if shortened[k] is not batch[k]} == {"completion_ids", "completion_mask"}

    ids, mask, tokenizer = rollout["completion_ids"], rollout["mask"], rollout["tokenizer"]
    spans = loop_spans(ids, mask, tokenizer, (PERCEPTION_PATTERN, REASONING_PATTERN))
    spans[2] = [[], []]  # the row without an image
    assert [bool(p) for p, _ in spans] == [True, False, False, True]
    expected = weights.new_zeros(weights.shape)
    perception, reasoning = torch.zeros_like(mask), torch.zeros_like(mask)
    logps, without_image, without_text = (policy(b) for b in (batch, corrupted, shortened))
    for b, (p, q) in enumerate(spans):
        rest = [t for t in range(ids.size(1)) if mask[b, t] and t not in p]
        padding = ids.size(1) - len(rest)
        assert shortened["completion_ids"][b].tolist() == ids[b, rest].tolist() + [7] * padding
        assert shortened["completion_mask"][b].tolist() == [1] * len(rest) + [0] * padding
        perception[b, p], reasoning[b, q] = True, True
        for t in p:
            expected[b, t] = logps[b, t] - without_image[b, t]
        for t in q:
            expected[b, t] = logps[b, t] - without_text[b, rest.index(t)]
    torch.testing.assert_close(weights, loop_weights(expected, expected, perception, reasoning, 1.0, 1.0))
    assert (weights[[1, 2]] == 1).all() and (weights[[0, 3]] != 1).any(1).all()

    assert {name: count.item() for name, (_, count) in metrics.items()} == {
        "role/perception_weight": perception.sum().item(),
        "role/reasoning_weight": reasoning.sum().item(),
        "role/well_formed": 4,
        "role/visual_dependency": perception.sum().item(),
        "role/perception_consistency": reasoning.sum().item(),
    }
    totals = {name: total.item() for name, (total, _) in metrics.items()}
    assert totals["role/well_formed"] == 2
    assert totals["role/perception_weight"] == pytest.approx(weights[perception].sum().item())
    assert totals["role/reasoning_weight"] == pytest.approx(weights[reasoning].sum().item())
    assert totals["role/visual_dependency"] == pytest.approx(expected[perception].sum().item())
    assert totals["role/perception_consistency"] == pytest.approx(expected[reasoning].sum().item())


def test_contrasts_that_make_no_difference_give_a_weight_of_one(rollout):
    def forward(batch):
        # A policy that ignores the image and all tokens but the one it writes.
        return -batch["completion_ids"].sin().double().abs()

    logps = forward(rollout["batch"])
    rollout |= {"forward": forward, "logps": logps, "logps_corrupted": lambda: logps}
    weights, metrics = RoleAwareWeighting()(**rollout)
    assert torch.equal(weights, torch.ones_like(rollout["logps"]))
    assert metrics["role/visual_dependency"][0] == metrics["role/perception_consistency"][0] == 0
    assert metrics["role/visual_dependency"][1] > 0


def test_an_image_that_is_not_corrupted_leaves_perception_at_the_baseline(rollout):
    weights, metrics = RoleAwareWeighting()(**{**rollout, "logps_corrupted": lambda: rollout["logps"]})
    assert metrics["role/visual_dependency"][0] == 0
    perception, reasoning = role_spans(rollout["completion_ids"], rollout["mask"], rollout["tokenizer"])
    for b in (0, 3):
        assert weights[b][perception[b]].unique().numel() == 1
        assert weights[b][reasoning[b]].unique().numel() > 1


def test_no_forward_when_no_row_is_well_formed(rollout):
    mask = rollout["mask"].clone()
    mask[[0, 3]] = False
    rollout["mask"] = mask
    weights, metrics = RoleAwareWeighting()(**rollout)
    assert rollout["forward"].batches == []
    assert weights.dtype == torch.float64 and (weights == 1).all()
    assert metrics["role/well_formed"][0] == 0 and metrics["role/visual_dependency"][1] == 0
    # Another process has a well-formed row: this one takes part in the forward passes.
    same, same_metrics = RoleAwareWeighting()(**rollout, reduce=lambda total: total + 5)
    assert len(rollout["forward"].batches) == 2
    torch.testing.assert_close(same, weights)
    assert same_metrics.keys() == metrics.keys()


def test_tokens_that_the_policy_only_read_stay_in_the_shortened_completion(rollout):
    perception, _ = role_spans(rollout["completion_ids"], rollout["mask"], rollout["tokenizer"])
    tool = int(perception[0].nonzero()[1])
    rollout["mask"] = rollout["mask"].clone()
    rollout["mask"][0, tool] = False
    RoleAwareWeighting()(**rollout)
    shortened = rollout["forward"].batches[1]
    kept = rollout["batch"]["completion_mask"][0].sum() - perception[0].sum() + 1
    assert shortened["completion_mask"][0].sum() == kept
    assert rollout["completion_ids"][0, tool] in shortened["completion_ids"][0]


def test_every_part_can_be_replaced(rollout):
    seen = {}

    def weigh(perception_scores, reasoning_scores, perception, reasoning, temperature, clip):
        seen["weigh"] = (temperature, clip)
        return torch.where(perception, perception_scores, torch.where(reasoning, reasoning_scores, 1))

    weighting = RoleAwareWeighting(
        temperature=2.0,
        clip=0.5,
        perception_score=lambda a, b: torch.full_like(a, 2.0),
        reasoning_score=lambda a, b: torch.full_like(a, 3.0),
        weigh=weigh,
    )
    weights, _ = weighting(**rollout)
    assert seen == {"weigh": (2.0, 0.5)}
    assert set(weights.unique().tolist()) == {1.0, 2.0, 3.0}
    assert replace(weighting, clip=0.25).clip == 0.25


ON, OFF = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: RoleAwareWeighting(perception_pattern="("),
            r"`perception_pattern` is not a regular expression: '\('",
        ),
        (lambda: RoleAwareWeighting(reasoning_pattern="["), r"`reasoning_pattern` is not a regular expression: '\['"),
        (lambda: RoleAwareWeighting(temperature=0.0), r"`temperature` .* got 0.0"),
        (lambda: RoleAwareWeighting(clip=-1.0), r"`clip` .* got -1.0"),
        (lambda: RoleAwareWeighting(clip=float("inf")), r"`clip` .* got inf"),
        (lambda: remove_span(ON.long(), ON, torch.ones(1, 3)), r"same shape .* `span` \(1, 3\)"),
        (lambda: role_spans(ON.long(), torch.ones(2), None), r"same shape .* `mask` \(2,\)"),
        (lambda: role_aware_weights(ON.float(), ON.float(), ON, ON), r"disjoint"),
        (lambda: role_aware_weights(ON.float(), ON.float(), ON, OFF, temperature=-1.0), r"`temperature` .* got -1.0"),
        (lambda: role_aware_weights(ON.float(), ON.float(), ON, OFF, clip=0.0), r"`clip` .* got 0.0"),
        (lambda: role_aware_weights(ON.float(), torch.zeros(1, 3), ON, OFF), r"`reasoning_scores` \(1, 3\)"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_batch_without_images(rollout):
    """A rollout of prompts without images, in a data set that has both kinds."""
    for name in ("pixel_values", "image_grid_thw", "num_images"):
        del rollout["batch"][name]
    calls = []
    weights, metrics = RoleAwareWeighting()(
        **{**rollout, "forward": calls.append, "logps_corrupted": lambda: calls.append(None)}
    )
    assert weights.eq(1.0).all() and calls == []
    assert metrics["role/well_formed"][0] == 0


def test_a_process_without_images_keeps_the_others_company(rollout):
    """Forwards may be collective: they run as often as where there are images."""
    for name in ("pixel_values", "image_grid_thw", "num_images"):
        del rollout["batch"][name]
    calls = []

    def forward(batch):
        calls.append(batch)
        return rollout["logps"]

    weights, _ = RoleAwareWeighting()(
        **{
            **rollout,
            "forward": forward,
            "logps_corrupted": lambda: forward(None),
            "reduce": lambda own: own + 5,
        }
    )
    assert weights.eq(1.0).all() and len(calls) == 2


@pytest.mark.parametrize("missing", ["image_grid_thw", "num_images"])
def test_images_that_cannot_be_told_apart(missing, rollout):
    del rollout["batch"][missing]
    with pytest.raises(ValueError, match=f"The batch has images, but no `{missing}`"):
        RoleAwareWeighting()(**rollout)


@pytest.mark.parametrize("num_images", [[1, 1, 1], [1, 1, 1, 0]])
def test_a_number_of_images_that_does_not_fit(num_images, rollout):
    rollout["batch"]["num_images"] = num_images
    with pytest.raises(ValueError, match=r"`num_images` .* the 4 rows and sum up to the 4 of"):
        RoleAwareWeighting()(**rollout)
