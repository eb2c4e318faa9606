"""What is measured, against loops and NumPy; and how it travels to the log."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings

from sapo_trl import Segments
from sapo_trl.advantages import masked_moments
from sapo_trl.metrics import MetricAccumulator, explained_variance, segment_statistics
from tests.strategies import noise, partitions, seeds, token_lists


class TestExplainedVariance:
    @given(partitions(), seeds)
    def test_equals_numpy(self, segments, seed):
        values, returns, mask = noise(segments.ids, seed), noise(segments.ids, seed + 1), segments.mask
        ours = explained_variance(values, returns, mask).item()
        v, r = values[mask].numpy(), returns[mask].numpy()
        if len(r) < 2:
            assert math.isnan(ours)
        else:
            assert ours == pytest.approx(1 - np.var(r - v) / np.var(r), rel=1e-9)

    def test_known_values(self):
        returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
        mask = torch.tensor([[True, True, True, False]])
        assert explained_variance(returns + 5, returns, mask) == 1  # a constant offset explains all
        assert explained_variance(torch.full_like(returns, 2.0), returns, mask) == 0
        assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
        assert explained_variance(returns, torch.ones_like(returns), mask).isnan()
        assert explained_variance(returns, returns, torch.zeros_like(mask)).isnan()

    def test_rounding_is_no_variance(self):
        """Float32 gives seven returns of 0.1 a variance of 6e-17."""
        returns, mask = torch.full((1, 7), 0.1), torch.ones(1, 7, dtype=torch.bool)
        assert masked_moments(returns, mask)[1] > 0
        assert explained_variance(torch.arange(7.0).unsqueeze(0), returns, mask).isnan()

    def test_over_processes(self):
        """`reduce` sums over processes: with two that hold the same, what one holds twice."""
        values, returns = torch.randn(2, 5), torch.randn(2, 5)
        mask = torch.ones(2, 5).bool()
        twice = [tensor.repeat(2, 1) for tensor in (values, returns, mask)]
        expected = explained_variance(*twice)
        torch.testing.assert_close(explained_variance(values, returns, mask, reduce=lambda x: 2 * x), expected)


class TestSegmentStatistics:
    @given(partitions(), seeds)
    @settings(max_examples=200)
    def test_equal_loops(self, segments, seed):
        entropies, values = noise(segments.ids, seed), noise(segments.ids, seed + 1)
        expected = {name: [] for name in segment_statistics(segments, entropies, values)}
        for row, parts in enumerate(token_lists(segments)):
            if parts:
                expected["segments/count"].append(len(parts))
            tokens = [t for part in parts for t in part]
            for part in parts:
                expected["segments/length"].append(len(part))
                expected["segments/single_token_share"].append(float(len(part) == 1))
            for index, t in enumerate(tokens):
                is_cut = any(part[-1] == t for part in parts)
                where = "at_cuts" if is_cut else "elsewhere"
                expected[f"segments/entropy_{where}"].append(entropies[row, t].item())
                if index + 1 < len(tokens):
                    change = abs(values[row, tokens[index + 1]] - values[row, t]).item()
                    expected[f"segments/value_change_{where}"].append(change)
        for name, (total, count) in segment_statistics(segments, entropies, values).items():
            assert count == len(expected[name]), name
            assert total.item() == pytest.approx(sum(expected[name]), abs=1e-5), name

    def test_without_values(self):
        segments = Segments(torch.tensor([[0, 0, 1]]))
        names = segment_statistics(segments, torch.zeros(1, 3)).keys()
        assert names and not any("value" in name for name in names)

    def test_nan_outside_the_segments_does_no_harm(self):
        segments = Segments(torch.tensor([[0, -1, 1, -1]]))
        dirty = torch.tensor([[1.0, torch.nan, 4.0, torch.nan]])
        statistics = segment_statistics(segments, dirty, dirty)
        assert all(total.isfinite() for total, _ in statistics.values())
        assert statistics["segments/value_change_at_cuts"] == (3.0, 1.0)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


class TestAccumulator:
    def test_weighted_means_and_maxima(self, accelerator):
        accumulator = MetricAccumulator()
        accumulator.add_mean("mean", torch.tensor(2.0), weight=3)
        accumulator.add_mean("mean", torch.tensor(6.0), weight=torch.tensor(1))
        accumulator.add_total("total", torch.tensor(10.0), 4)
        accumulator.add_total("total", torch.tensor(2), torch.tensor(2.0))
        accumulator.add_max("max", torch.tensor(3))
        accumulator.add_max("max", torch.tensor(-1.0))
        accumulator.add_total("nothing", torch.tensor(0.0), 0)
        result = accumulator.flush(accelerator)
        assert math.isnan(result.pop("nothing"))
        assert result == {"mean": 3.0, "total": 2.0, "max": 3.0}
        assert all(type(value) is float for value in result.values())

    def test_flush_starts_anew(self, accelerator):
        accumulator = MetricAccumulator()
        assert accumulator.flush(accelerator) == {}
        accumulator.add_mean("a", torch.tensor(1.0))
        accumulator.flush(accelerator)
        accumulator.add_mean("b", torch.tensor(2.0))
        assert accumulator.flush(accelerator) == {"b": 2.0}

    def test_keeps_no_graph(self, accelerator):
        accumulator = MetricAccumulator()
        weight = torch.ones((), requires_grad=True)
        accumulator.add_mean("a", weight * 2)
        accumulator.add_max("b", weight * 3)
        assert not any(tensor.requires_grad for tensor in (*accumulator._sums.values(), *accumulator._maxima.values()))
        assert accumulator.flush(accelerator) == {"a": 2.0, "b": 3.0}
