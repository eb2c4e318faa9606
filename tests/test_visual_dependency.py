"""The dependence of tokens on the picture and the weights of responses, against their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapo_trl.visual_dependency import ResponseScale, mean_dependency, visual_dependency


numbers = st.floats(-40, 40)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20))
def test_dependency_equals_the_definition(pairs):
    logps, corrupted = torch.tensor(pairs, dtype=torch.float64).T
    found = visual_dependency(logps, corrupted)
    for (logp, other), d in zip(pairs, found.tolist(), strict=True):
        x = max(-20.0, min(20.0, other - logp))
        assert d == pytest.approx(max(0.0, min(10.0, math.exp(x) - x - 1)), abs=1e-9)


def test_equal_log_probabilities_depend_on_nothing():
    logps = -torch.rand(3, 5) * 30
    assert not visual_dependency(logps, logps.clone()).any()


def test_a_small_difference_does_not_drown_in_rounding():
    """In float32 `exp(x) - x - 1` of 1e-4 would be 0 or 1.2e-7."""
    x = torch.full((1, 1), 1e-4)
    assert visual_dependency(torch.zeros(1, 1), x).item() == pytest.approx(5e-9, rel=1e-2)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=12), st.floats(0, 1))
def test_response_weights_equal_the_definition_and_average_one(scores, smallest):
    found = ResponseScale.of(torch.tensor(scores, dtype=torch.float64), smallest)
    weights = found.weights(torch.tensor(scores, dtype=torch.float64), smallest).tolist()
    low, high = min(scores), max(scores)
    if high - low <= 1e-6:
        assert weights == [1.0] * len(scores)
        return
    n = [(score - low) / (high - low) for score in scores]
    m = smallest + (1 - smallest) / (sum(n) / len(n))
    for weight, share in zip(weights, n, strict=True):
        assert weight == pytest.approx(smallest + (m - smallest) * share, abs=1e-9)
    assert sum(weights) / len(weights) == pytest.approx(1.0, abs=1e-9)
    assert min(weights) == pytest.approx(smallest, abs=1e-9)


def test_responses_without_tokens_do_not_count():
    dependency = torch.tensor([[1.0, 3.0, 9.0], [0.0, 0.0, 9.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, False], [False, False, False]])
    scores = mean_dependency(dependency, mask)
    assert scores[:2].tolist() == [2.0, 0.0] and scores[2].isnan()
    # n = 1, 0: m = .9 + .1 / .5 = 1.1
    weights = ResponseScale.of(scores, 0.9).weights(scores, 0.9)
    assert weights.tolist() == pytest.approx([1.1, 0.9, 1.0])
    nothing = scores[2:]
    assert ResponseScale.of(nothing, 0.9).weights(nothing, 0.9).tolist() == [1.0]
