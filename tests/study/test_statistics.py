"""The study's statistics find an effect that is there and none where there is none."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sapo_trl.study.statistics import (
    adjusted_p_values,
    interquartile_mean,
    mean_interval,
    paired_difference,
    probability_of_improvement,
)


def runs(rng: np.random.Generator, effect: float, seeds: int = 5) -> tuple[dict[int, float], dict[int, float]]:
    """Two algorithms' scores: each seed has a level of its own, which both share, and each run has its own noise."""
    level = rng.normal(0.5, 0.1, seeds)
    ours, theirs = (level + rng.normal(0, 0.02, seeds) for _ in range(2))
    return dict(enumerate(ours + effect)), dict(enumerate(theirs))


@pytest.fixture
def few_resamples(monkeypatch):
    """For tests about Student's and Wilcoxon's statistics, which do not resample, of very many differences."""
    monkeypatch.setattr("sapo_trl.study.statistics.RESAMPLES", 10)


class TestPlantedFacts:
    @pytest.mark.usefixtures("few_resamples")
    def test_a_known_effect_is_found(self):
        rng = np.random.default_rng(0)
        found = [paired_difference(*runs(rng, effect=0.1)) for _ in range(200)]
        assert np.mean([d.t_low > 0 for d in found]) > 0.95
        assert np.mean([d.interval.value for d in found]) == pytest.approx(0.1, abs=0.005)

    @pytest.mark.usefixtures("few_resamples")
    def test_a_known_null_is_not(self):
        rng = np.random.default_rng(1)
        found = [paired_difference(*runs(rng, effect=0.0)) for _ in range(1000)]
        # 5 % of the tests err, within three standard errors of 1,000 of them.
        assert np.mean([d.p_value < 0.05 for d in found]) == pytest.approx(0.05, abs=0.02)
        assert np.mean([d.t_low <= 0 <= d.t_high for d in found]) == pytest.approx(0.95, abs=0.02)

    @pytest.mark.usefixtures("few_resamples")
    def test_ranks_find_an_effect_that_one_broken_run_hides_from_the_mean(self):
        rng = np.random.default_rng(6)
        ours, theirs = runs(rng, effect=0.1, seeds=10)
        whole, theirs[0] = paired_difference(ours, theirs), -2.0
        broken = paired_difference(ours, theirs)
        assert whole.p_value < 0.01 and whole.rank_p_value < 0.01
        assert broken.p_value > 0.1 and broken.rank_p_value < 0.01
        nulls = [paired_difference(*runs(rng, effect=0.0, seeds=10)).rank_p_value for _ in range(500)]
        assert np.mean(np.array(nulls) < 0.05) == pytest.approx(0.05, abs=0.03)

    def test_unpaired_scores_would_hide_the_effect(self):
        rng = np.random.default_rng(2)
        ours, theirs = runs(rng, effect=0.08)
        unpaired = stats.ttest_ind(list(ours.values()), list(theirs.values())).pvalue
        assert paired_difference(ours, theirs).p_value < 0.01 < 0.05 < unpaired

    @pytest.mark.usefixtures("few_resamples")
    def test_of_many_nulls_few_survive_adjustment(self):
        rng = np.random.default_rng(3)
        families = [[paired_difference(*runs(rng, effect=0.0)).p_value for _ in range(10)] for _ in range(150)]
        raw = np.mean([min(family) < 0.05 for family in families])
        adjusted = np.mean([min(adjusted_p_values(family)) < 0.05 for family in families])
        assert raw > 0.3 and adjusted < 0.09

    def test_the_coverage_that_the_docstring_states(self):
        rng = np.random.default_rng(4)
        samples = rng.normal(0, 1, (1000, 5))
        covered = [(i := mean_interval(row)).low <= 0 <= i.high for row in samples]
        assert np.mean(covered) == pytest.approx(0.83, abs=0.04)


def test_mean_interval_is_scipys_percentile_bootstrap():
    scores = np.random.default_rng(5).normal(size=30)
    ours = mean_interval(scores)
    theirs = stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    assert ours.value == pytest.approx(scores.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.02)


def test_one_seed_has_no_interval():
    difference = paired_difference({3: 0.7, 4: 0.1}, {3: 0.5})
    assert difference.pairs == 1 and difference.interval.value == pytest.approx(0.2)
    assert difference.interval.low == difference.interval.high == difference.interval.value
    assert np.isnan(difference.p_value) and np.isnan(difference.t_low)


def test_equal_scores_are_no_difference():
    difference = paired_difference({0: 0.5, 1: 0.25}, {0: 0.5, 1: 0.25})
    assert difference.p_value == 1.0 and difference.interval.value == 0.0


def test_two_runs_that_differ_alike_by_chance_prove_nothing():
    difference = paired_difference({0: 0.5, 1: 0.25}, {0: 0.498, 1: 0.248})
    assert difference.interval.value == pytest.approx(0.002)
    assert np.isnan(difference.p_value) and np.isnan(difference.t_low)


def test_interquartile_mean_of_known_numbers():
    # Of eight numbers the middle four are 2, 3, 4, 5.
    result = interquartile_mean({"one": [0.0, 2.0, 4.0, 100.0], "two": [1.0, 3.0, 5.0, -50.0]})
    assert result.value == pytest.approx(np.mean([1.0, 2.0, 3.0, 4.0]))
    assert result.low <= result.value <= result.high


score_lists = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(ours=st.lists(score_lists, min_size=1, max_size=3), theirs=score_lists)
def test_probability_of_improvement_counts_pairs(ours, theirs):
    scores = {str(task): row for task, row in enumerate(ours)}
    baseline = dict.fromkeys(scores, theirs)
    per_task = [
        np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(row, theirs)]) for row in ours
    ]
    result = probability_of_improvement(scores, baseline)
    assert result.value == pytest.approx(np.mean(per_task))
    assert 0.0 <= result.low <= result.high <= 1.0
    # Whoever does not win loses.
    assert probability_of_improvement(baseline, scores).value == pytest.approx(1 - result.value)


def test_adjusted_p_values_by_hand():
    # p times the number of tests over its rank, monotone from the largest down.
    assert adjusted_p_values([0.01, float("nan"), 0.04, 0.03]) == pytest.approx(
        [0.03, float("nan"), 0.04, 0.04], nan_ok=True
    )


@pytest.mark.parametrize("scores", [[], [0.1, float("nan")], [[0.1]]])
def test_scores_that_are_none(scores):
    with pytest.raises(ValueError, match="non-empty list of finite numbers"):
        mean_interval(scores)


def test_nothing_in_common():
    with pytest.raises(ValueError, match=r"No seed is in both: \[0\] and \[1\]"):
        paired_difference({0: 0.5}, {1: 0.5})
    with pytest.raises(ValueError, match="No task is in both"):
        probability_of_improvement({"a": [0.5]}, {"b": [0.5]})
