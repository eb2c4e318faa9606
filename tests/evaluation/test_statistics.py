"""avg@k, pass@k and intervals against hand calculations, scipy and brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sapo_trl.evaluation.benchmark import Result, mean_accuracy
from sapo_trl.evaluation.statistics import benchmark_metrics, pass_at_k, pass_counts, repeated_metrics
from tests.evaluation.evaluation_run import worst_case


@given(st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(data):
    n = data.draw(st.integers(1, 8))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(np.array([c]), n, k)[0] == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_by_hand_and_where_binomials_overflow():
    # 1 - C(3, 2) / C(5, 2) = 1 - 3/10
    assert pass_at_k(np.array([2]), 5, 2)[0] == pytest.approx(0.7)
    exact = 1 - math.comb(1990, 1000) / math.comb(2000, 1000)
    assert pass_at_k(np.array([10]), 2000, 1000)[0] == pytest.approx(exact, rel=1e-9)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"between 1 and n=5, got {k}"):
            pass_at_k(np.array([1]), 5, k)


def test_which_k_are_reported():
    assert [pass_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_repeated_metrics_by_hand():
    # Problems with 1, 4 and 0 of 4 right ones; a part mark counts for the average and for no pass.
    groups = [[[1, 0, 0, 0]], [[1, 1, 1, 1], [0.5, 0, 0, 0]]]
    found = repeated_metrics(groups)
    assert found["avg@4"].value == pytest.approx((0.25 + 1 + 0.125) / 3)
    assert found["pass@1"].value == pytest.approx((0.25 + 1 + 0) / 3)
    assert found["pass@2"].value == pytest.approx(((1 - 3 / 6) + 1 + 0) / 3)
    assert found["pass@4"].value == pytest.approx((1 + 1 + 0) / 3)
    assert set(repeated_metrics([[[1.0]], [[0.0]]])) == {"avg@1"}


def test_the_interval_of_an_accuracy_is_scipys():
    scores = np.random.default_rng(0).random(400) < 0.37
    found = repeated_metrics([[[float(score)]] for score in scores])["avg@1"]
    expected = stats.bootstrap(
        (scores.astype(float),), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == scores.mean()
    assert found.low == pytest.approx(expected.low, abs=0.01)
    assert found.high == pytest.approx(expected.high, abs=0.01)


def test_problems_of_a_group_are_drawn_together():
    """Ten copies of each of 40 problems tell no more than the 40 do: the interval is as wide."""
    scores = np.random.default_rng(0).random(40) < 0.5
    single = repeated_metrics([[[float(score)]] for score in scores])["avg@1"]
    copied = repeated_metrics([[[float(score)]] * 10 for score in scores])["avg@1"]
    apart = repeated_metrics([[[float(score)]] for score in np.repeat(scores, 10)])["avg@1"]
    assert copied == single
    assert apart.high - apart.low < 0.5 * (single.high - single.low)


def as_results(table):
    """`table[generation][group]` is a list of scores."""
    return [[[Result("p", score, {}) for score in group] for group in generation] for generation in table]


def test_the_metrics_of_a_benchmark_are_averaged_over_generations():
    # Worst case by hand: generation 0 has one of two groups all right, generation 1 none.
    table = [[[1, 1], [0, 1]], [[1, 0], [1, 0]]]
    found = benchmark_metrics(as_results(table), worst_case)
    assert found["worst_case"].value == pytest.approx(0.25)
    assert found["average"].value == pytest.approx(5 / 8)
    assert found["worst_case"].low == 0.0 and found["worst_case"].high <= 1.0


def test_the_two_ways_to_an_accuracy_agree():
    rng = np.random.default_rng(0)
    table = (rng.random((2, 60, 3)) < 0.6).astype(float).tolist()

    def same(groups):
        return mean_accuracy(groups)

    fast, slow = (benchmark_metrics(as_results(table), way)["accuracy"] for way in (mean_accuracy, same))
    assert fast.value == pytest.approx(slow.value)
    assert fast.low == pytest.approx(slow.low, abs=0.02)
    assert fast.high == pytest.approx(slow.high, abs=0.02)


def test_a_metric_that_a_resample_may_lack():
    def by_topic(groups):
        every = [result for group in groups for result in group]
        rare = [result.correct for result in every if result.fields["topic"] == "rare"]
        return {"accuracy": mean_accuracy(groups)["accuracy"]} | ({"rare": sum(rare) / len(rare)} if rare else {})

    groups = [[Result(str(i), float(i % 2), {"topic": "rare" if i == 0 else "other"})] for i in range(8)]
    found = benchmark_metrics([groups], by_topic)
    # One problem with one result: its resamples agree, and say nothing about its error.
    assert found["rare"].value == 0.0
    assert math.isnan(found["rare"].low) and math.isnan(found["rare"].high)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_equal_scores_have_the_exact_interval(score):
    found = repeated_metrics([[[score, score]] for _ in range(8)])
    # No success in 8 trials is as probable as 2.5 % for a rate of 1 - 0.025^(1/8).
    far = 1 - 0.025 ** (1 / 8)
    for interval in (found["avg@2"], found["pass@1"], found["pass@2"]):
        assert interval.value == score
        assert (interval.low, interval.high) == pytest.approx((0.0, far) if score == 0 else (1 - far, 1.0))
    accuracy = benchmark_metrics(as_results([[[score]] * 8]), mean_accuracy)["accuracy"]
    assert accuracy.high - accuracy.low == pytest.approx(far)


def test_groups_are_the_trials_of_the_exact_interval():
    found = repeated_metrics([[[0.0]] * 10] * 8)["avg@1"]
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 8))
