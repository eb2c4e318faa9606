"""Lift–q curves: against loops, with planted effects and without, by stage, and from Monte-Carlo values."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from sapo_trl.analysis import lift_curve, token_jumps, trend_test, valued_state_jumps
from sapo_trl.analysis.lift import stages
from sapo_trl.statistics import ratio_bands


def made_responses(generator, count=200, steps=6, effect=0.0, lengths=(2, 40)) -> pd.DataFrame:
    """Responses with jumps of `|normal| * scale * exp(effect * entropy)`, scale and length differing by response."""
    rows = []
    for index in range(count):
        length = int(generator.integers(*lengths))
        entropies = generator.exponential(size=length)
        jumps = np.abs(generator.normal(size=length)) * generator.exponential() * np.exp(effect * entropies)
        signs = generator.choice([-1, 1], size=length)
        values = np.concatenate([[0.0], np.cumsum(jumps * signs)])[:length]
        step = index * steps // count
        rows.append({"step": step, "process": 0, "response": index, "entropies": entropies, "values": values})
    return pd.DataFrame(rows)


def slow_lift(jumps: pd.DataFrame, share: float) -> float:
    """By a loop over tokens in falling order of entropy; equal entropies are averaged over all of their orders."""
    numerator = denominator = 0.0
    for _, response in jumps.groupby("cluster"):
        rows = list(zip(response["entropy"], response["jump"], strict=True))
        left = share * len(rows)
        for level in sorted({entropy for entropy, _ in rows}, reverse=True):
            tied = [jump for entropy, jump in rows if entropy == level]
            taken = min(left, len(tied))
            numerator += taken * sum(tied) / len(tied)
            left -= taken
        denominator += share * sum(jump for _, jump in rows)
    return numerator / denominator


small_tables = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=25
).map(
    lambda rows: (
        pd.DataFrame(rows, columns=["cluster", "entropy", "jump"])
        .astype({"entropy": float, "jump": float})
        .sort_values("cluster", kind="stable", ignore_index=True)
    )
)


class TestCurve:
    @settings(max_examples=60, deadline=None)
    @given(small_tables, st.floats(0.01, 1.0))
    def test_equals_loops(self, jumps, share):
        curve = lift_curve(jumps, shares=(share, 1.0), num_resamples=3)
        if jumps["jump"].sum() == 0:
            assert np.isnan(curve.lift).all()
            return
        assert curve.lift[0] == pytest.approx(slow_lift(jumps, share), rel=1e-9)
        assert curve.lift[1] == pytest.approx(1.0)
        assert (curve.responses, curve.jumps) == (jumps["cluster"].nunique(), len(jumps))

    def test_by_hand(self):
        """Three jumps 6, 2, 1 at entropies 3, 2, 1: half of them are the first and half of the second."""
        jumps = pd.DataFrame({"cluster": 0, "entropy": [1.0, 3.0, 2.0], "jump": [1.0, 6.0, 2.0]})
        curve = lift_curve(jumps, shares=(1 / 3, 0.5, 1.0), num_resamples=1)
        assert curve.lift == pytest.approx([6 / 3, (6 + 1) / 1.5 / 3, 1.0])

    def test_planted_effect(self):
        jumps = token_jumps(made_responses(np.random.default_rng(0), effect=0.5))
        curve = lift_curve(jumps)
        assert curve.low[1] > 1.5 and (np.diff(curve.lift) < 0).all()
        assert (curve.low <= curve.lift).all() and (curve.lift <= curve.high).all()
        assert curve.lift[-1] == curve.low[-1] == curve.high[-1] == pytest.approx(1.0)
        assert trend_test(jumps).p_value < 1e-10

    def test_without_an_effect_bands_cover_one_and_p_values_are_uniform(self):
        generator = np.random.default_rng(1)
        covered, p_values = [], []
        for _ in range(150):
            jumps = token_jumps(made_responses(generator, count=60))
            curve = lift_curve(jumps, shares=(0.1, 0.3), num_resamples=200)
            covered.append((curve.low <= 1) & (curve.high >= 1))
            p_values.append(trend_test(jumps).p_value)
        coverage = np.mean(covered, axis=0)
        assert (coverage > 0.85).all() and (coverage < 0.995).all()
        assert kstest(p_values, "uniform").pvalue > 0.01

    def test_bands_draw_responses_and_not_tokens(self):
        """One response copied many times over tells nothing new: the band is that of the different ones."""
        jumps = token_jumps(made_responses(np.random.default_rng(2), count=30, effect=0.3))
        inside = jumps.loc[jumps.index.repeat(20)]  # each token twenty times, in its own response
        once, often = (lift_curve(table, shares=(0.2,)) for table in (jumps, inside))
        assert often.lift == pytest.approx(once.lift, rel=0.05)
        assert (often.high - often.low) == pytest.approx(once.high - once.low, rel=0.15)

    def test_is_deterministic(self):
        jumps = token_jumps(made_responses(np.random.default_rng(3), count=20))
        one, other = lift_curve(jumps, seed=4), lift_curve(jumps.sample(frac=1, random_state=0), seed=4)
        assert one.low == pytest.approx(other.low) and one.high == pytest.approx(other.high)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"shares": (0.0, 0.5)}, r"`shares` must be numbers in \(0, 1\]"),
            ({"confidence": 1.0}, r"`confidence` must lie in \(0, 1\), got 1.0"),
            ({"num_resamples": 0}, "`num_resamples` must be at least 1, got 0"),
        ],
    )
    def test_errors(self, arguments, message):
        jumps = pd.DataFrame({"cluster": [0], "entropy": [1.0], "jump": [1.0]})
        with pytest.raises(ValueError, match=message):
            lift_curve(jumps, **arguments)


class TestBands:
    def test_of_a_mean_are_those_of_the_normal_distribution(self):
        numbers = np.random.default_rng(0).normal(3, 2, size=(400, 1))
        low, high = ratio_bands(numbers, np.ones_like(numbers), 0.95, 4000, seed=1)
        reach = 1.96 * numbers.std() / 20
        assert low[0] == pytest.approx(numbers.mean() - reach, abs=0.03)
        assert high[0] == pytest.approx(numbers.mean() + reach, abs=0.03)

    def test_pieces_make_no_difference_of_kind(self, monkeypatch):
        """More clusters than fit into one piece."""
        numbers = np.random.default_rng(0).normal(3, 2, size=(3000, 1))
        low, high = ratio_bands(numbers, np.ones_like(numbers), 0.9, 2000, seed=1)
        assert high[0] - low[0] == pytest.approx(2 * 1.645 * numbers.std() / math.sqrt(3000), rel=0.1)


class TestTrend:
    def test_parts_are_equal_and_from_the_ends(self):
        """Seven tokens in three parts of two: the middle one is left out, whatever it is."""
        entropies = np.arange(7.0)

        def test_with(middle):
            jumps = [0.0, 1.0, 2.0, middle, 3.0, 4.0, 5.0]
            rows = [pd.DataFrame({"cluster": c, "entropy": entropies, "jump": jumps}) for c in range(5)]
            return trend_test(pd.concat(rows, ignore_index=True), bins=3)

        # Perfect order: 1 * 1 + 2 * 2 + 3 * 3 from each response.
        assert test_with(100.0).statistic == test_with(-100.0).statistic == 5 * 14
        assert test_with(0.0).p_value < 0.001

    def test_falling_jumps_are_no_rise(self):
        rows = [pd.DataFrame({"cluster": c, "entropy": np.arange(9.0), "jump": -np.arange(9.0)}) for c in range(9)]
        assert trend_test(pd.concat(rows), bins=3).p_value > 0.99

    def test_short_responses_are_left_out(self):
        rows = [pd.DataFrame({"cluster": c, "entropy": np.arange(4.0), "jump": 1.0}) for c in range(4)]
        trend = trend_test(pd.concat(rows), bins=5)
        assert trend.responses == 0 and math.isnan(trend.p_value)
        with pytest.raises(ValueError, match="`bins` must be at least 3, got 2"):
            trend_test(pd.concat(rows), bins=2)


class TestTokenJumps:
    def test_equal_loops_and_leave_the_last_token_out(self):
        responses = made_responses(np.random.default_rng(0), count=15, lengths=(0, 6))
        expected = [
            (cluster, row.step, row.entropies[t], abs(row.values[t + 1] - row.values[t]))
            for cluster, row in enumerate(_records(responses))
            for t in range(len(row.values) - 1)
        ]
        jumps = token_jumps(responses)
        assert [tuple(row) for row in jumps.itertuples(index=False)] == [pytest.approx(row) for row in expected]

    def test_a_run_without_a_critic_is_named(self):
        responses = made_responses(np.random.default_rng(0), count=3)
        responses["values"] = [np.zeros(len(row)) for row in responses["values"]]
        with pytest.raises(ValueError, match="no critic that values every token"):
            token_jumps(responses)

    def test_stages_are_thirds_of_the_steps(self):
        named = stages(pd.Series([0, 0, 0, 0, 4, 8, 12, 16, 20]))
        assert named.tolist() == ["early"] * 5 + ["middle"] * 2 + ["late"] * 2
        assert stages(pd.Series([3, 7])).tolist() == ["early", "middle"]


class TestValuedStates:
    def make(self):
        responses = pd.DataFrame(
            {
                "step": [0, 4],
                "process": [0, 1],
                "response": [2, 0],
                "segment_ids": [np.array([0, 0, 1, 2, 2]), np.array([0, 1])],
                "entropies": [np.array([0.1, 0.9, 0.8, 0.2, 0.3]), np.array([0.5, 0.6])],
            }
        )
        values = pd.DataFrame(
            [
                # step, process, response, segment, value, monte_carlo_value, standard_error
                (0, 0, 2, 0, 0.5, 0.4, 0.1),
                (0, 0, 2, 1, 0.6, 1.0, 0.2),
                (0, 0, 2, 2, 0.9, 0.7, 0.0),
                (4, 1, 0, 0, 0.1, np.nan, np.nan),
                (4, 1, 0, 1, 0.1, 0.2, 0.1),
                (4, 0, 0, 0, 0.1, 0.2, 0.1),  # not recorded
                (4, 0, 0, 1, 0.1, 0.3, 0.1),
            ],
            columns=["step", "process", "response", "segment", "value", "monte_carlo_value", "standard_error"],
        )
        return responses, values

    def test_pairs_have_the_entropy_of_the_cut_between_them(self):
        pairs = valued_state_jumps(*self.make())
        assert pairs["cluster"].tolist() == [0, 0] and pairs["step"].tolist() == [0, 0]
        assert pairs["entropy"].tolist() == [0.9, 0.8]
        assert pairs["jump"].tolist() == pytest.approx([0.6, 0.3])
        assert pairs["squared_jump"].tolist() == pytest.approx([0.36 - 0.05, 0.09 - 0.04])
        assert pairs["critic_jump"].tolist() == pytest.approx([0.1, 0.3])

    def test_recordings_that_do_not_meet_are_named(self):
        responses, values = self.make()
        with pytest.raises(ValueError, match="record the responses of the same rollouts"):
            valued_state_jumps(responses, values.assign(step=values["step"] + 1))

    def test_squared_jumps_are_free_of_the_continuations_noise(self):
        """Nine continuations a state: noise alone jumps, and is taken off; a true jump remains."""
        generator = np.random.default_rng(0)
        count, segments = 400, 6
        truth = np.full(segments, 0.5)
        truth[3:] = 0.8
        rows, responses = [], []
        for index in range(count):
            rewards = generator.random((segments, 9)) < truth[:, None]
            mean, error = rewards.mean(axis=1), rewards.std(axis=1, ddof=1) / 3
            rows += [(0, 0, index, s, truth[s], mean[s], error[s]) for s in range(segments)]
            responses.append((0, 0, index, np.arange(segments), np.arange(segments, dtype=float)))
        columns = ["step", "process", "response"]
        values = pd.DataFrame(rows, columns=[*columns, "segment", "value", "monte_carlo_value", "standard_error"])
        table = pd.DataFrame(responses, columns=[*columns, "segment_ids", "entropies"])
        means = valued_state_jumps(table, values).groupby("entropy").mean()
        assert means["jump"].min() > 0.12
        expected = np.diff(truth) ** 2
        assert means["squared_jump"].to_numpy() == pytest.approx(expected, abs=0.02)


def _records(frame):
    class Row:
        def __init__(self, values):
            self.__dict__.update(values)

    return [Row(values) for values in frame.to_dict("records")]
