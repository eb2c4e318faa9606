"""The study's statistics: against other libraries and all permutations, and on planted effects."""

import itertools

import numpy as np
import pytest
from scipy import stats

from sapo_trl.study.statistics import (
    blocked_contrast,
    fisher_p_value,
    holm,
    median_interval,
    permutation_p_value,
    share_difference,
    trend_weights,
)


def runs(rng: np.random.Generator, effect: float, worlds: int = 5, seeds: int = 4) -> tuple[dict, dict]:
    """Scores of two arms. Each world has a level that both share, and each run has its own noise."""
    levels = rng.normal(0, 1, worlds)
    return tuple({w: (levels[w] + e + rng.normal(0, 0.5, seeds)).tolist() for w in range(worlds)} for e in (effect, 0))


def difference(ours: dict, theirs: dict):
    return blocked_contrast([(1.0, ours), (-1.0, theirs)])


class TestContrast:
    @pytest.mark.parametrize("sizes", [(4, 4), (3, 7)])
    def test_one_block_is_welch_s_test(self, sizes):
        rng = np.random.default_rng(0)
        ours, theirs = rng.normal(1, 1, sizes[0]), rng.normal(0, 3, sizes[1])
        found = difference({0: ours}, {0: theirs})
        for side, name in (("two", "two-sided"), ("greater", "greater"), ("less", "less")):
            test = stats.ttest_ind(ours, theirs, equal_var=False, alternative=name)
            assert found.p_value(side) == pytest.approx(test.pvalue, rel=1e-9)
        interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
        assert (found.interval.low, found.interval.high) == pytest.approx(tuple(interval), rel=1e-9)

    def test_a_known_null_and_a_known_effect(self):
        rng = np.random.default_rng(1)
        nulls = [difference(*runs(rng, 0.0)) for _ in range(1000)]
        # 5 % of the tests err, within three standard errors of 1,000 of them.
        assert np.mean([c.p_value("two") < 0.05 for c in nulls]) == pytest.approx(0.05, abs=0.02)
        assert np.mean([c.interval.low <= 0 <= c.interval.high for c in nulls]) == pytest.approx(0.95, abs=0.02)
        effects = [difference(*runs(rng, 0.7)) for _ in range(200)]
        assert np.mean([c.p_value("greater") < 0.01 for c in effects]) > 0.9
        assert np.mean([c.interval.value for c in effects]) == pytest.approx(0.7, abs=0.05)

    def test_blocks_take_the_worlds_levels_out(self):
        rng = np.random.default_rng(2)
        ours, theirs = runs(rng, 0.7)
        pooled = stats.ttest_ind(sum(ours.values(), []), sum(theirs.values(), []), equal_var=False).pvalue
        assert difference(ours, theirs).p_value("two") < 0.01 < pooled

    def test_seeds_are_no_pairs(self):
        rng = np.random.default_rng(3)
        ours, theirs = runs(rng, 0.3)
        shuffled = {world: row[::-1] for world, row in theirs.items()}
        assert difference(ours, theirs).interval.low == pytest.approx(difference(ours, shuffled).interval.low)

    def test_an_interaction_is_a_difference_of_differences(self):
        rng = np.random.default_rng(4)
        (a, b), (c, d) = runs(rng, 0.5), runs(rng, 0.1)
        found = blocked_contrast([(1, a), (-1, b), (-1, c), (1, d)])
        one, other = difference(a, b), difference(c, d)
        assert found.interval.value == pytest.approx(one.interval.value - other.interval.value)
        assert found.error == pytest.approx(np.hypot(one.error, other.error))

    def test_trend_weights_give_the_slope(self):
        numbers, means = [0.0, 1.6, 2.6], np.array([0.3, 0.9, 1.0])
        slope = stats.linregress(numbers, means).slope
        assert np.dot(trend_weights(numbers), means) == pytest.approx(slope)
        with pytest.raises(ValueError, match="different numbers"):
            trend_weights([1.0, 1.0])

    def test_scores_without_spread(self):
        same = {0: [0.5, 0.5]}
        assert difference(same, same).p_value("two") == 1.0
        assert np.isnan(difference({0: [0.6, 0.6]}, same).p_value("two"))

    @pytest.mark.parametrize(
        ("ours", "message"),
        [
            ({0: [0.1]}, "Block 0 has 1 score"),
            ({1: [0.1, 0.2]}, "the same blocks"),
            ({0: [0.1, float("nan")]}, "finite numbers"),
        ],
    )
    def test_scores_that_do_not_fit(self, ours, message):
        with pytest.raises(ValueError, match=message):
            difference({0: [0.1, 0.2]}, ours)


class TestPermutation:
    @pytest.mark.parametrize("side", ["two", "greater", "less"])
    @pytest.mark.parametrize("seed", range(5))
    def test_all_permutations_by_hand(self, side, seed):
        rng = np.random.default_rng(seed)
        ours, theirs = ({b: rng.integers(0, 9, 3).tolist() for b in range(2)} for _ in range(2))
        sums = []
        for choice in itertools.product(*[itertools.combinations(ours[b] + theirs[b], 3) for b in range(2)]):
            sums.append(sum(map(sum, choice)))
        sums, found = np.array(sums), sum(map(sum, ours.values()))
        extreme = {
            "greater": sums >= found,
            "less": sums <= found,
            "two": abs(sums - sums.mean()) >= abs(found - sums.mean()) - 1e-9,
        }
        assert permutation_p_value(ours, theirs, side) == pytest.approx(extreme[side].mean(), abs=1e-12)

    def test_agrees_with_scipy_in_one_block(self):
        rng = np.random.default_rng(0)
        ours, theirs = rng.integers(200, 480, 8), rng.integers(150, 450, 8)
        test = stats.permutation_test(
            (ours, theirs), lambda x, y: x.mean() - y.mean(), alternative="greater", n_resamples=np.inf
        )
        assert permutation_p_value({0: ours.tolist()}, {0: theirs.tolist()}, "greater") == pytest.approx(test.pvalue)

    def test_five_worlds_of_the_study_s_size(self):
        rng = np.random.default_rng(1)
        ours, theirs = ({w: rng.integers(300 + up, 512, 4).tolist() for w in range(5)} for up in (60, 0))
        p_value = permutation_p_value(ours, theirs, "greater")
        draws = np.zeros(20_000)
        for world in ours:
            pool = np.array(ours[world] + theirs[world])
            draws += rng.permuted(np.tile(pool, (len(draws), 1)), axis=1)[:, :4].sum(1)
        assert p_value == pytest.approx(np.mean(draws >= sum(map(sum, ours.values()))), abs=0.01)

    def test_unequal_blocks_and_broken_counts(self):
        with pytest.raises(ValueError, match="equally many runs"):
            permutation_p_value({0: [1, 2]}, {0: [1]}, "two")
        with pytest.raises(ValueError, match="whole numbers"):
            permutation_p_value({0: [1, 2]}, {0: [1, 2.5]}, "two")


class TestShares:
    def test_newcombe_s_published_example(self):
        # Newcombe (1998), Statistics in Medicine 17, 873-890, table II, method 10: 56/70 - 48/80.
        found = share_difference((56, 70), (48, 80))
        assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)

    def test_stays_inside_the_range(self):
        found = share_difference((10, 10), (0, 10))
        assert found.value == found.high == 1.0 and 0.5 < found.low < 1.0

    def test_fisher_counts_tables(self):
        # 1 of 4 against 4 of 4: the hypergeometric chance of at most 1 of the 5 successes among our 4.
        assert fisher_p_value((1, 4), (4, 4), "less") == pytest.approx(stats.hypergeom(8, 5, 4).cdf(1))
        assert fisher_p_value((1, 4), (4, 4), "two") == pytest.approx(8 / 56)


class TestHolm:
    def test_by_hand(self):
        # Sorted .01, .02, .04 times 3, 2, 1; monotone. An open test counts as 1.
        assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
        assert holm([0.01, float("nan")]) == pytest.approx([0.02, 1.0])
        assert holm([0.2, 0.9, 0.5]) == pytest.approx([0.6, 1.0, 1.0])

    def test_of_many_nulls_few_survive(self):
        rng = np.random.default_rng(5)
        families = rng.uniform(size=(2000, 10))
        assert np.mean([min(holm(row)) < 0.05 for row in families]) == pytest.approx(0.05, abs=0.015)
        assert np.mean(families.min(axis=1) < 0.05) > 0.3


class TestMedian:
    def test_ranks_of_twenty_scores(self):
        # The table of sign-test intervals has ranks 6 and 15 for twenty scores.
        found = median_interval(list(range(1, 21)))
        assert (found.value, found.low, found.high) == (10.5, 6, 15)

    @pytest.mark.parametrize("count", [6, 7, 10, 20])
    def test_covers_the_median_of_a_skewed_distribution(self, count):
        rng = np.random.default_rng(count)
        rows = rng.exponential(size=(2000, count))
        covered = [(i := median_interval(row)).low <= np.log(2) <= i.high for row in rows]
        assert np.mean(covered) >= 0.935

    def test_five_scores_have_none(self):
        found = median_interval([1, 2, 3, 4, 100])
        assert found.value == 3 and np.isnan(found.low) and np.isnan(found.high)
