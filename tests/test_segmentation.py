import math
from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_trl import Segments
from sapo_trl.embedded import build_tokenizer
from sapo_trl.segmentation import (
    CutpointSegmenter,
    EntropySegmenter,
    NewlineSegmenter,
    NoisyBoundaries,
    ProbabilitySegmenter,
    RandomCuts,
    SequenceSegmenter,
    StepSegmenter,
    TokenSegmenter,
    accepted_inputs,
    entropy_segments,
)
from sapo_trl.segmentation.entropy import cut_at_largest
from tests.strategies import masks, noise, seeds


def turns_of(keep):
    """Positions of each turn of a row: a turn ends at a hole."""
    turns, previous = [], None
    for t in (t for t, kept in enumerate(keep) if kept):
        if previous is None or t > previous + 1:
            turns.append([])
        turns[-1].append(t)
        previous = t
    return turns


def loop_entropy_cuts(entropies, mask, percent):
    """The positions of the top-k entropies of each row, and the turns' ends. Exact ceil, ties to the earlier token."""
    cuts = []
    for row, keep in zip(entropies.tolist(), mask.tolist(), strict=True):
        positions = [t for t, kept in enumerate(keep) if kept]
        k = max(1, math.ceil(Fraction(len(positions)) * Fraction(percent) / 100))
        chosen = sorted(positions, key=lambda t: (-row[t], t))[:k]
        cuts.append(sorted(set(chosen) | {turn[-1] for turn in turns_of(keep)}))
    return cuts


@given(masks(max_length=20), seeds, st.integers(1, 100))
def test_entropy_segments_equal_the_definition(mask, seed, percent):
    # Rounded, so that many entropies are exactly equal.
    entropies = noise(mask, seed).abs().mul(2).round()
    segments = entropy_segments(entropies, mask, top_percent=percent)
    found = [row.nonzero().flatten().tolist() for row in segments.is_last]
    assert found == loop_entropy_cuts(entropies, mask, percent)


@given(masks(max_length=20), seeds)
def test_a_cut_that_starts_a_segment_is_one_that_ended_it_moved_by_one_token(mask, seed):
    entropies = noise(mask, seed)
    starts = entropy_segments(entropies, mask, cut="start").is_first
    selected = entropy_segments(entropies, mask, cut="end").is_last
    positions = [row.nonzero().flatten().tolist() for row in mask]
    for b, tokens in enumerate(positions):
        k = max(1, math.ceil(len(tokens) * 0.3))
        chosen = sorted(tokens, key=lambda t: (-entropies[b, t].item(), t))[:k]
        turns = turns_of(mask[b].tolist())
        assert starts[b].nonzero().flatten().tolist() == sorted(set(chosen) | {turn[0] for turn in turns})
        assert selected[b].nonzero().flatten().tolist() == sorted(set(chosen) | {turn[-1] for turn in turns})


def test_golden_case():
    entropies = torch.tensor([[0.1, 2, 0.3, 0.2, 1.5, 0.05]])
    segments = entropy_segments(entropies, torch.ones(1, 6, dtype=torch.bool), top_percent=30.0)
    assert segments.is_last.nonzero()[:, 1].tolist() == [1, 4, 5]


@pytest.mark.parametrize(
    ("length", "percent", "cuts"),
    [(25, 28, 7), (10, 30, 3), (100, 7, 7), (50, 14, 7), (3, 33.3, 1), (1500, 2.2, 33)],
)
def test_percentages_are_exact(length, percent, cuts):
    # In binary floating point 25 * 0.28 is above 7, and its ceiling 8; 1500 * 2.2 / 100 is above 33.
    entropies = torch.arange(length, 0, -1.0).unsqueeze(0)
    segments = entropy_segments(entropies, torch.ones(1, length, dtype=torch.bool), percent)
    assert segments.is_last[0, :cuts].all()
    assert segments.is_last[0, cuts:-1].sum() == 0


@given(masks(max_length=15), seeds)
def test_padding_and_batch_order_change_nothing(mask, seed):
    entropies = noise(mask, seed)
    segments = entropy_segments(entropies, mask)
    pad = torch.full((mask.size(0), 3), torch.nan, dtype=torch.float64)
    padded = entropy_segments(torch.cat([entropies, pad], 1), torch.cat([mask, pad.isfinite()], 1))
    assert torch.equal(padded.ids[:, : mask.size(1)], segments.ids)
    assert padded.ids[:, mask.size(1) :].eq(-1).all()
    order = torch.randperm(mask.size(0))
    assert torch.equal(entropy_segments(entropies[order], mask[order]).ids, segments.ids[order])


@given(masks(), seeds)
def test_hundred_percent_cuts_everywhere(mask, seed):
    segments = entropy_segments(noise(mask, seed), mask, top_percent=100.0)
    assert torch.equal(segments.ids, TokenSegmenter()(noise(mask, seed), mask).ids)
    assert torch.equal(segments.is_last, mask)


@given(masks())
def test_sequence_segmenter_makes_one_segment(mask):
    segments = SequenceSegmenter()(mask.double(), mask)
    assert torch.equal(segments.ids, mask.long() - 1)


@given(masks(max_length=20), seeds, st.integers(1, 5))
def test_probability_segmenter_cuts_at_the_least_probable_tokens(mask, seed, num_cuts):
    logps = -noise(mask, seed).abs()
    segments = ProbabilitySegmenter(num_cuts)(torch.zeros_like(logps), mask, logps=logps)
    for b, keep in enumerate(mask.tolist()):
        positions = [t for t, kept in enumerate(keep) if kept]
        chosen = sorted(positions, key=lambda t: (logps[b, t].item(), t))[:num_cuts]
        ends = {turn[-1] for turn in turns_of(keep)}
        assert segments.is_last[b].nonzero().flatten().tolist() == sorted(set(chosen) | ends)


the_tokenizer = cache(build_tokenizer)


@pytest.fixture(scope="module")
def tokenizer():
    return the_tokenizer()


def texts_of(segments, ids, tokenizer):
    """The text of each segment of the one row."""
    kept = segments.mask[0]
    return [
        "".join(tokenizer.decode([token]) for token in ids[0][(segments.ids[0] == m) & kept].tolist())
        for m in range(int(segments.count))
    ]


def encode(text, tokenizer):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return ids, torch.ones_like(ids, dtype=torch.bool)


def test_newline_segments_are_the_lines(tokenizer):
    ids, mask = encode("AB=7\n\n7-3=4\nso \\boxed{4}", tokenizer)
    segments = NewlineSegmenter()(mask.float(), mask, completion_ids=ids, tokenizer=tokenizer)
    assert texts_of(segments, ids, tokenizer) == ["AB=7\n\n", "7-3=4\n", "so \\boxed{4}"]


def test_step_segments_start_where_a_step_is_announced(tokenizer):
    ids, mask = encode("Plan. Step 1: add. Step 2: subtract. Step twelve", tokenizer)
    segments = StepSegmenter()(mask.float(), mask, completion_ids=ids, tokenizer=tokenizer)
    pieces = texts_of(segments, ids, tokenizer)
    assert "".join(pieces) == "Plan. Step 1: add. Step 2: subtract. Step twelve"
    # A token may begin with the blank before the word, so the cut is compared without it.
    assert [piece.strip() for piece in pieces] == ["Plan.", "Step 1: add.", "Step 2: subtract. Step twelve"]


def test_text_segmenters_skip_holes(tokenizer):
    ids, mask = encode("one\nTOOL\nStep 1: two", tokenizer)
    text = [tokenizer.decode([token]) for token in ids[0].tolist()]
    offsets = torch.tensor([len("".join(text[:index])) for index in range(len(text))])
    mask = mask & ~((offsets >= 4) & (offsets < 9)).unsqueeze(0)
    lines = NewlineSegmenter(tokenizer)(mask.float(), mask, completion_ids=ids)
    steps = StepSegmenter(tokenizer=tokenizer)(mask.float(), mask, completion_ids=ids)
    assert texts_of(lines, ids, tokenizer) == ["one\n", "Step 1: two"]
    assert texts_of(steps, ids, tokenizer) == ["one\n", "Step 1: two"]


def test_ids_that_only_padded_embeddings_have(tokenizer):
    ids, mask = encode("a\nb", tokenizer)
    ids = torch.cat([ids, torch.tensor([[len(tokenizer) + 7]])], dim=1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert int(NewlineSegmenter(tokenizer)(mask.float(), mask, completion_ids=ids).count) == 2
    assert int(StepSegmenter(tokenizer=tokenizer)(mask.float(), mask, completion_ids=ids).count) == 1


@pytest.mark.parametrize("segmenter", [EntropySegmenter(), TokenSegmenter(), SequenceSegmenter()])
def test_all_masked_rows_have_no_segments(segmenter):
    mask = torch.tensor([[False, False], [True, False]])
    segments = segmenter(torch.zeros(2, 2), mask)
    assert isinstance(segments, Segments)
    assert segments.count.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entropy_segments(torch.zeros(1, 2), torch.ones(1, 2), top_percent=0), r"\(0, 100\], got 0"),
        (lambda: EntropySegmenter(top_percent=100.5), r"\(0, 100\], got 100.5"),
        (lambda: EntropySegmenter(top_percent=float("nan")), r"\(0, 100\], got nan"),
        (lambda: EntropySegmenter(cut="middle"), r'`cut` must be "end" or "start", got \'middle\''),
        (lambda: ProbabilitySegmenter(num_cuts=0), r"`num_cuts` must be at least 1, got 0"),
        (lambda: StepSegmenter(pattern="("), r"not a regular expression"),
        (lambda: entropy_segments(torch.zeros(1, 3), torch.ones(1, 2)), r"same shape"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_text_segmenters_need_a_tokenizer():
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="tokenizer"):
        NewlineSegmenter()(mask.float(), mask, completion_ids=torch.zeros(1, 2, dtype=torch.int64))


def test_pattern_that_matches_the_end_of_the_text(tokenizer):
    ids, mask = encode("one two", tokenizer)
    segments = StepSegmenter(pattern="$")(mask.float(), mask, completion_ids=ids, tokenizer=tokenizer)
    assert segments.count.tolist() == [1]


@pytest.mark.parametrize("segmenter", [NewlineSegmenter(), StepSegmenter()])
def test_text_segmenters_of_no_rows(segmenter, tokenizer):
    mask = torch.ones(0, 5, dtype=torch.bool)
    segments = segmenter(mask.float(), mask, completion_ids=mask.long(), tokenizer=tokenizer)
    assert segments.ids.shape == (0, 5)


def test_cuts_are_those_of_a_stable_order():
    """Many ties, rows without tokens, no cuts and more cuts than tokens."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        rows, length = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(2))
        scores = torch.randint(0, 4, (rows, length), generator=generator).float()
        mask = torch.rand(rows, length, generator=generator) < 0.7
        num_cuts = torch.randint(0, 10, (rows,), generator=generator)
        order = torch.sort(scores.masked_fill(~mask, -torch.inf), dim=1, descending=True, stable=True).indices
        selected = torch.zeros_like(mask).scatter(1, order, torch.arange(length) < num_cuts.unsqueeze(1))
        expected = Segments.from_last_tokens(selected & mask, mask)
        assert torch.equal(cut_at_largest(scores, mask, num_cuts, "end").ids, expected.ids)


# -------------------------------------------------------------------------------------------------------------- turns


CUTTERS = {
    "entropy": EntropySegmenter(),
    "entropy, cut at starts": EntropySegmenter(cut="start"),
    "prob": ProbabilitySegmenter(2),
    "cutpoint": CutpointSegmenter(interval=2),
    "token": TokenSegmenter(),
    "newline": NewlineSegmenter(),
    "step": StepSegmenter(),
    "noisy": NoisyBoundaries(EntropySegmenter(), rate=0.5),
    "random": RandomCuts(EntropySegmenter()),
}
PIECES = ["Step 1: ", "one", "\n", " ", "Step", " 2: two", "\n\n", "three", "<|im_end|>"]


def cut_row(name, mask, seed):
    """The partition of random tokens, many of them line breaks or announcements of steps."""
    tokenizer, generator = the_tokenizer(), torch.Generator().manual_seed(seed)
    pieces = torch.randint(len(PIECES), mask.shape, generator=generator)
    words = [tokenizer(piece)["input_ids"][0] for piece in PIECES]
    inputs = {"completion_ids": torch.tensor(words)[pieces], "tokenizer": tokenizer, "logps": -noise(mask, seed).abs()}
    segmenter = CUTTERS[name]
    return segmenter(noise(mask, seed), mask, **{key: inputs[key] for key in accepted_inputs(segmenter)}), inputs


@pytest.mark.parametrize("name", CUTTERS)
@given(masks(max_length=20), seeds)
@settings(deadline=None)
def test_no_segment_goes_on_behind_a_hole(name, mask, seed):
    segments, _ = cut_row(name, mask, seed)
    assert torch.equal(segments.mask, mask)
    for ids, keep in zip(segments.ids.tolist(), mask.tolist(), strict=True):
        of_turns = [{ids[t] for t in turn} for turn in turns_of(keep)]
        assert sum(map(len, of_turns)) == len(set().union(*of_turns))


@pytest.mark.parametrize("name", ["newline", "step"])
@given(masks(max_rows=1, max_length=20), seeds)
@settings(deadline=None)
def test_text_is_cut_in_each_turn_as_in_a_response_of_its_own(name, mask, seed):
    segments, inputs = cut_row(name, mask, seed)
    found, expected, count = segments.ids[0].tolist(), [-1] * mask.size(1), 0
    for turn in turns_of(mask[0].tolist()):
        ids = inputs["completion_ids"][:, turn[0] : turn[-1] + 1]
        alone = CUTTERS[name](torch.zeros(ids.shape), torch.ones_like(ids).bool(), ids, inputs["tokenizer"])
        for t, own in zip(turn, alone.ids[0].tolist(), strict=True):
            expected[t] = count + own
        count += int(alone.count)
    assert found == expected


@given(masks(max_length=20), seeds, st.floats(0, 1))
def test_noise_keeps_the_number_of_segments_and_the_ends_of_turns(mask, seed, rate):
    ids = noise(mask, seed).mul(100).long()
    for segmenter in (NoisyBoundaries(EntropySegmenter(), rate), RandomCuts(EntropySegmenter())):
        segments = segmenter(noise(mask, seed), mask, logps=noise(mask, seed), completion_ids=ids)
        assert torch.equal(segments.count, EntropySegmenter()(noise(mask, seed), mask).count)
