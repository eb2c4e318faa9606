"""The share of tokens with the largest scores, against sorted lists."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapo_trl.token_mask import largest_share


@given(
    data=st.data(),
    rows=st.integers(1, 4),
    length=st.integers(0, 12),
    percent=st.integers(1, 100),
)
def test_equals_sorted_lists(data, rows, length, percent):
    scores = [[data.draw(st.integers(-3, 3)) / 2 for _ in range(length)] for _ in range(rows)]
    mask = [[data.draw(st.booleans()) for _ in range(length)] for _ in range(rows)]
    found = largest_share(
        torch.tensor(scores).view(rows, length), torch.tensor(mask).view(rows, length).bool(), percent / 100
    )
    for row in range(rows):
        tokens = [t for t in range(length) if mask[row][t]]
        wanted = math.ceil(Fraction(percent, 100) * len(tokens))
        ranked = sorted(tokens, key=lambda t: (-scores[row][t], t))  # noqa: B023
        assert found[row].nonzero().flatten().tolist() == sorted(ranked[:wanted])


def test_scores_outside_the_mask_do_not_matter():
    scores = torch.tensor([[math.nan, 1.0, math.inf, -math.inf, 2.0]])
    mask = torch.tensor([[False, True, False, True, True]])
    assert largest_share(scores, mask, 0.5).tolist() == [[False, True, False, False, True]]
    assert torch.equal(largest_share(scores, mask, 1.0), mask)


@pytest.mark.parametrize("share", [0.0, 1.1, math.nan])
def test_share_is_a_share(share):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        largest_share(torch.zeros(1, 2), torch.ones(1, 2), share)
