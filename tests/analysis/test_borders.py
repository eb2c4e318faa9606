"""Agreement of cuts with borders, and the segmenters that spoil cuts by chance."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from sapo_trl import Segments
from sapo_trl.analysis import border_agreement
from sapo_trl.analysis.borders import borders_of, cuts_of
from sapo_trl.segmentation import (
    EntropySegmenter,
    NewlineSegmenter,
    NoisyBoundaries,
    ProbabilitySegmenter,
    RandomCuts,
    SequenceSegmenter,
    TokenSegmenter,
)
from sapo_trl.segments import turn_ends
from sapo_trl.trainer.checks import check_segments
from tests.strategies import masks, noise, seeds
from tests.testing_utils import Recorder, fixed_rollout, random_completions, sapo_trainer


@st.composite
def marked_responses(draw):
    lengths = draw(st.lists(st.integers(0, 8), min_size=1, max_size=5).filter(any))
    marks = [[draw(st.sets(st.integers(0, length - 1))) if length else set() for length in lengths] for _ in range(2)]
    return marks[0], marks[1], lengths


class TestAgreement:
    @settings(max_examples=60, deadline=None)
    @given(marked_responses())
    def test_equals_loops(self, data):
        cuts, borders, lengths = data
        result = border_agreement([sorted(c) for c in cuts], [sorted(b) for b in borders], lengths, num_resamples=2)
        hits = num_cuts = num_borders = 0
        chance = 0.0
        for cut, border, length in zip(cuts, borders, lengths, strict=True):
            cut, border = cut - {length - 1}, border - {length - 1}
            hits += len(cut & border)
            num_cuts += len(cut)
            num_borders += len(border)
            chance += len(cut) * len(border) / (length - 1) if length > 1 else 0
        assert (result.hits, result.cuts, result.borders) == (hits, num_cuts, num_borders)
        assert result.expected_hits == pytest.approx(chance)
        assert result.precision == pytest.approx(hits / num_cuts if num_cuts else math.nan, nan_ok=True)
        assert result.recall == pytest.approx(hits / num_borders if num_borders else math.nan, nan_ok=True)
        total = num_cuts + num_borders
        assert result.f1 == pytest.approx(2 * hits / total if total else math.nan, nan_ok=True)

    @settings(max_examples=30, deadline=None)
    @given(marked_responses())
    def test_true_cuts_are_perfect(self, data):
        _, borders, lengths = data
        result = border_agreement([list(b) for b in borders], [list(b) for b in borders], lengths, num_resamples=2)
        if result.borders:
            assert result.precision == result.recall == result.f1 == 1.0

    def test_chance_is_what_random_cuts_get(self):
        generator = np.random.default_rng(0)
        lengths = generator.integers(5, 30, size=300)
        borders = [generator.choice(n - 1, size=3, replace=False).tolist() for n in lengths]
        results = [
            border_agreement(
                [generator.choice(n - 1, size=n // 3, replace=False).tolist() for n in lengths],
                borders,
                lengths,
                num_resamples=50,
            )
            for _ in range(60)
        ]
        mean = np.mean([result.hits for result in results])
        spread = np.std([result.hits for result in results]) / math.sqrt(len(results))
        assert mean == pytest.approx(results[0].expected_hits, abs=4 * spread)
        p_values = np.array([result.p_value for result in results])
        assert 0.35 < p_values.mean() < 0.65 and p_values.min() > 1e-4

    def test_table_and_intervals(self):
        result = border_agreement([[0, 1], [2]] * 20, [[0], [2, 3]] * 20, [4, 5] * 20)
        table = result.table().set_index("measure")
        assert table.loc["precision", "value"] == pytest.approx(2 / 3)
        assert table.loc["precision", "chance"] == pytest.approx((2 / 3 + 2 / 4) / 3)
        assert table.loc["f1", "chance"] == pytest.approx(2 * (2 / 3 + 2 / 4) / 6)
        assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()
        assert result.p_value < 0.01

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([], [], []), "one entry per response and at least one, got 0, 0 and 0"),
            (([[0]], [[0]], [2, 2]), "got 1, 1 and 2"),
            (([[0], [3]], [[0], [1]], [2, 3]), r"`cuts` of response 1 must lie in 0\.\.2, its tokens; got 3"),
            (([[0]], [[1, 0, 1]], [4]), r"`borders` of response 0 has a position twice: \[1, 0, 1\]"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            border_agreement(*arguments)

    def test_reading_recorded_responses(self):
        assert cuts_of([0, 0, 1, 2, 2]) == [1, 2]
        assert cuts_of([]) == []
        tokens = ["Step", " 1", "\n", "\n", "", "so", " 2\n", "end"]
        assert borders_of(tokens, r"\n+") == [3, 6]
        assert borders_of(tokens, "Step 1") == [1]
        assert borders_of([], r"\n") == [] and borders_of(tokens, "x*") == []


def ids_for(mask: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randint(0, 1000, mask.shape, generator=torch.Generator().manual_seed(seed))


def inner_cuts(segments: Segments) -> list[set[int]]:
    """Positions of each row's cuts inside of turns."""
    return [
        {t for t, (here, after) in enumerate(zip(ids, ids[1:], strict=False)) if -1 < here < after}
        for ids in segments.ids.tolist()
    ]


makers = st.sampled_from(
    [
        lambda inner, seed: NoisyBoundaries(inner, 0.5, seed),
        lambda inner, seed: NoisyBoundaries(inner, 1.0, seed),
        RandomCuts,
    ]
)
inner_segmenters = st.sampled_from(
    [EntropySegmenter(30.0), EntropySegmenter(80.0, "start"), TokenSegmenter(), SequenceSegmenter()]
)


class TestSegmenters:
    @settings(max_examples=80, deadline=None)
    @given(masks(), seeds, makers, inner_segmenters)
    def test_counts_stay_and_rows_stand_alone(self, mask, seed, make, inner):
        entropies, ids = noise(mask, seed).float(), ids_for(mask, seed)
        segmenter = make(inner, seed)
        result = segmenter(entropies, mask, entropies, ids)
        check_segments(result, mask)
        # The ends of turns are cuts, whether or not the inner segmenter cuts there.
        assert [*map(len, inner_cuts(result))] == [*map(len, inner_cuts(inner(entropies, mask)))]
        assert torch.equal(result.is_last & turn_ends(mask), turn_ends(mask))
        # Again, with other rows around, garbage in the holes and more padding: the same cuts.
        assert torch.equal(segmenter(entropies, mask, entropies, ids).ids, result.ids)
        for row in range(mask.size(0)):
            alone = [torch.nn.functional.pad(x[row : row + 1], (0, 3)) for x in (entropies, mask, ids)]
            alone[2] = torch.where(alone[1], alone[2], 7)
            padded = segmenter(alone[0], alone[1], alone[0], alone[2])
            assert torch.equal(padded.ids[:, :-3], result.ids[row : row + 1])

    @settings(max_examples=60, deadline=None)
    @given(masks(), seeds, inner_segmenters)
    def test_rates(self, mask, seed, inner):
        entropies, ids = noise(mask, seed).float(), ids_for(mask, seed)
        before = inner_cuts(inner(entropies, mask))
        moved = []
        for rate in (0.0, 0.3, 0.7, 1.0):
            result = NoisyBoundaries(inner, rate, seed)(entropies, mask, entropies, ids)
            after = inner_cuts(result)
            moved.append([old - new for old, new in zip(before, after, strict=True)])
            if rate == 1.0:
                slots = (mask & ~turn_ends(mask)).sum(dim=1).tolist()
                for old, new, places in zip(before, after, slots, strict=True):
                    free = places - len(old)
                    assert len(new - old) == min(len(old), free)
        assert not any(moved[0])
        for fewer, more in zip(moved, moved[1:], strict=False):
            assert all(one <= other for one, other in zip(fewer, more, strict=True))

    def test_positions_are_uniform(self):
        """Twelve tokens, three inner cuts: each free position, and each triple of positions, is as likely."""
        rows = 12_000
        mask = torch.ones(rows, 12, dtype=torch.bool)
        ids = ids_for(mask, 0)
        entropies = torch.zeros(rows, 12)
        entropies[:, [2, 5, 6]] = 1.0

        def cut(entropies, mask):
            return Segments.from_last_tokens(entropies > 0, mask)

        noisy = NoisyBoundaries(cut, 0.25)(entropies, mask, entropies, ids)
        counts = noisy.is_last.sum(dim=0)
        assert counts[[2, 5, 6]].float().mean().item() / rows == pytest.approx(0.75, abs=0.01)
        assert chisquare(counts[[0, 1, 3, 4, 7, 8, 9, 10]].numpy()).pvalue > 0.001
        assert chisquare(counts[[2, 5, 6]].numpy()).pvalue > 0.001

        drawn = RandomCuts(cut)(entropies, mask, entropies, ids)
        triples = Counter(tuple(sorted(row)) for row in inner_cuts(drawn))
        assert len(triples) == 165  # 11 choose 3
        assert chisquare(list(triples.values())).pvalue > 0.001

    def test_seeds_and_tokens_decide(self):
        mask = torch.ones(1, 40, dtype=torch.bool)
        entropies, ids = noise(mask, 0).float(), ids_for(mask, 0)
        other_ids = ids.clone()
        other_ids[0, 3] += 1
        swapped = ids[:, [1, 0, *range(2, 40)]]
        cuts = [
            RandomCuts(EntropySegmenter(), seed)(entropies, mask, entropies, given)
            for seed, given in ((0, ids), (1, ids), (0, other_ids), (0, swapped))
        ]
        assert len({tuple(segments.ids[0].tolist()) for segments in cuts}) == 4

    def test_errors(self):
        with pytest.raises(ValueError, match=r"`rate` .* must lie in \[0, 1\], got 1.5"):
            NoisyBoundaries(EntropySegmenter(), 1.5)
        for make in (lambda segmenter: NoisyBoundaries(segmenter, 0.5), RandomCuts):
            with pytest.raises(TypeError, match="`segmenter` must be a callable"):
                make(EntropySegmenter)

    @pytest.mark.parametrize("family", ["qwen2"], indirect=True)
    @pytest.mark.parametrize("inner", [ProbabilitySegmenter(2), NewlineSegmenter(), EntropySegmenter()])
    def test_in_the_trainer(self, family, tmp_path, inner):
        """Inner segmenters get the inputs that they name; the partition reaches the rollout."""
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            trainer_kwargs={
                "segmenter": NoisyBoundaries(inner, 1.0),
                "callbacks": [recorder],
                "rollout_func": fixed_rollout(random_completions(5, 6)),
            },
        )
        trainer.train()
        assert len(recorder.rollouts) == 1
        (rollout,) = recorder.rollouts
        if isinstance(inner, ProbabilitySegmenter):
            plain = inner(rollout.entropies, rollout.segments.mask, rollout.logps)
            assert torch.equal(rollout.segments.count, plain.count)
            assert not torch.equal(rollout.segments.ids, plain.ids)
