import pytest
import torch
from hypothesis import given

from sapo_trl import Segments
from sapo_trl.segments import turn_ends, turn_starts
from tests.strategies import masks, noise, partitions, seeds, token_lists


def loop_ids(is_last, mask):
    """Partition by the definition, one token at a time: a mark ends a segment, and so does a hole."""
    rows = []
    for marks, keep in zip(is_last.tolist(), mask.tolist(), strict=True):
        ids, count, is_open = [], 0, False
        for mark, kept in zip(marks, keep, strict=True):
            count += int(kept and not is_open)
            ids.append(count - 1 if kept else -1)
            is_open = kept and not mark
        rows.append(ids)
    return torch.tensor(rows)


@given(masks(), seeds)
def test_from_last_tokens_equals_the_definition(mask, seed):
    is_last = noise(mask, seed) > 0
    assert torch.equal(Segments.from_last_tokens(is_last, mask).ids, loop_ids(is_last, mask))


@given(masks(), seeds)
def test_from_first_tokens_is_from_last_tokens_read_backwards(mask, seed):
    marks = noise(mask, seed) > 0
    forwards = Segments.from_first_tokens(marks, mask)
    backwards = Segments.from_last_tokens(marks.flip(1), mask.flip(1))
    # Reading from the right, a segment's first token is its last.
    assert torch.equal(forwards.is_first, backwards.is_last.flip(1))
    assert torch.equal(forwards.count, backwards.count)


@given(masks())
def test_turns_are_the_runs_of_the_mask(mask):
    padded = torch.nn.functional.pad(mask, (1, 1)).tolist()
    for row, (starts, ends) in enumerate(zip(turn_starts(mask).tolist(), turn_ends(mask).tolist(), strict=True)):
        for t, (is_start, is_end) in enumerate(zip(starts, ends, strict=True)):
            before, here, after = padded[row][t : t + 3]
            assert is_start == (here and not before)
            assert is_end == (here and not after)


@given(partitions())
def test_boundaries_count_and_lengths(segments):
    rows = token_lists(segments)
    is_first, is_last = torch.zeros_like(segments.mask), torch.zeros_like(segments.mask)
    for b, row in enumerate(rows):
        for tokens in row:
            is_first[b, tokens[0]] = True
            is_last[b, tokens[-1]] = True
    assert torch.equal(segments.is_first, is_first)
    assert torch.equal(segments.is_last, is_last)
    assert segments.count.tolist() == [len(row) for row in rows]
    for b, row in enumerate(rows):
        assert segments.lengths[b, : len(row)].tolist() == [len(tokens) for tokens in row]
        assert segments.lengths[b, len(row) :].eq(0).all()


@given(partitions())
def test_partition_survives_a_round_trip_through_its_boundaries(segments):
    assert torch.equal(Segments.from_last_tokens(segments.is_last, segments.mask).ids, segments.ids)
    assert torch.equal(Segments.from_first_tokens(segments.is_first, segments.mask).ids, segments.ids)


@given(partitions(), seeds)
def test_sum_mean_and_expand_equal_loops(segments, seed):
    x = noise(segments.ids, seed)
    sums, means = segments.sum(x), segments.mean(x)
    expanded = segments.expand(means)
    assert sums.shape == means.shape == (x.size(0), int(segments.count.max()))
    expected = torch.zeros_like(x)
    for b, row in enumerate(token_lists(segments)):
        for m, tokens in enumerate(row):
            total = sum(x[b, t] for t in tokens)
            torch.testing.assert_close(sums[b, m], total, rtol=0, atol=1e-12)
            torch.testing.assert_close(means[b, m], total / len(tokens), rtol=0, atol=1e-12)
            expected[b, tokens] = total / len(tokens)
        assert sums[b, len(row) :].eq(0).all()
    torch.testing.assert_close(expanded, expected, rtol=0, atol=1e-12)


@given(partitions(), seeds)
def test_nothing_changes_where_the_largest_count_is_known(segments, seed):
    x, known = noise(segments.ids, seed), Segments(segments.ids, max_count=max(map(len, token_lists(segments))))
    for name in ("sum", "mean"):
        assert torch.equal(getattr(known, name)(x), getattr(segments, name)(x))
    assert torch.equal(known.expand(known.mean(x)), segments.expand(segments.mean(x)))
    assert torch.equal(known.lengths, segments.lengths)


@given(partitions(max_rows=2, max_length=6), seeds)
def test_gradients_of_sum_mean_and_expand(segments, seed):
    x = noise(segments.ids, seed, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: segments.expand(segments.mean(x)).square() + segments.expand(segments.sum(x)), x
    )


@given(partitions(), seeds)
def test_what_is_outside_the_segments_does_not_matter(segments, seed):
    clean = noise(segments.ids, seed)
    dirty = clean.masked_fill(~segments.mask, torch.nan).requires_grad_()
    assert torch.equal(segments.mean(dirty), segments.mean(clean))
    segments.mean(dirty).sum().backward()
    assert dirty.grad.isfinite().all()
    assert dirty.grad[~segments.mask].eq(0).all()


@given(partitions(), seeds)
def test_at_state_reads_the_first_or_last_token(segments, seed):
    x = noise(segments.ids, seed)
    for state, position in (("start", 0), ("end", -1)):
        read = segments.at_state(x, state)
        for b, row in enumerate(token_lists(segments)):
            assert read[b, : len(row)].tolist() == [x[b, tokens[position]].item() for tokens in row]


def test_half_precision_is_summed_in_float32():
    # 4,096 ones: bf16 cannot count beyond 256.
    segments = Segments.from_last_tokens(torch.zeros(1, 4096, dtype=torch.bool), torch.ones(1, 4096, dtype=torch.bool))
    total = segments.sum(torch.ones(1, 4096, dtype=torch.bfloat16))
    assert total.dtype == torch.float32
    assert total.item() == 4096


def test_rows_without_tokens():
    segments = Segments(torch.full((2, 3), -1))
    assert segments.count.tolist() == [0, 0]
    assert segments.sum(torch.ones(2, 3)).shape == (2, 0)
    assert torch.equal(segments.expand(torch.zeros(2, 0)), torch.zeros(2, 3))
    assert not segments.is_first.any() and not segments.is_last.any()


def test_no_tokens_at_all():
    segments = Segments.from_last_tokens(torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.bool))
    assert segments.count.tolist() == [0, 0]
    assert segments.expand(segments.mean(torch.zeros(2, 0))).shape == (2, 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Segments(torch.zeros(2, 3)), r"int64.*float32"),
        (lambda: Segments(torch.zeros(3, dtype=torch.int64)), r"\(batch, length\)"),
        (
            lambda: Segments.from_last_tokens(torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)),
            r"same shape.*\(2, 3\) and \(2, 4\)",
        ),
        (lambda: Segments(torch.zeros(1, 2, dtype=torch.int64)).sum(torch.zeros(1, 3)), r"shape of the ids, \(1, 2\)"),
        (lambda: Segments(torch.zeros(1, 2, dtype=torch.int64)).expand(torch.zeros(1, 2)), "one column a segment, 1"),
        (lambda: Segments(torch.zeros(1, 1, dtype=torch.int64)).state_mask("middle"), r'"start" or "end".*middle'),
    ],
)
def test_wrong_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
