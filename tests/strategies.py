"""Hypothesis strategies and slow references shared by the tests of the tensor functions."""

import torch
from hypothesis import strategies as st

from sapo_trl import Segments


@st.composite
def masks(draw, max_rows: int = 4, max_length: int = 12) -> torch.Tensor:
    """bool (B, T) with holes, empty rows and full rows."""
    rows = draw(st.integers(1, max_rows))
    length = draw(st.integers(1, max_length))
    bits = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    return torch.tensor(bits).view(rows, length)


@st.composite
def partitions(draw, **kwargs) -> Segments:
    """A random partition of a random mask."""
    mask = draw(masks(**kwargs))
    marks = draw(st.lists(st.booleans(), min_size=mask.numel(), max_size=mask.numel()))
    return Segments.from_last_tokens(torch.tensor(marks).view_as(mask), mask)


def noise(like: torch.Tensor, seed: int, requires_grad: bool = False) -> torch.Tensor:
    """float64 standard normal values of a shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


seeds = st.integers(0, 2**31 - 1)


def token_lists(segments: Segments) -> list[list[list[int]]]:
    """For each row, the positions of each segment's tokens, found by plain loops over the ids."""
    rows = []
    for ids in segments.ids.tolist():
        count = max(ids, default=-1) + 1
        rows.append([[t for t, id_ in enumerate(ids) if id_ == m] for m in range(count)])
    return rows
