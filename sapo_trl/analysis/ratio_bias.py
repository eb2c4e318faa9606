"""
The bias of a segment's ratio: the geometric mean of its tokens' ratios beside their arithmetic mean and their product.

SAPO's ratio of a segment is the geometric mean of its tokens' ratios. Their product would make the estimator unbiased
for the segment. Their arithmetic mean is the average of token-level ratios. The paper's App. D (Eq. 26) bounds the
difference of the two means. That equation was not available to us, so the bound here is ours, with its proof in
[`~sapo_trl.losses.geometric_bias`].
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch

from ..losses import geometric_bias
from ..segments import Segments, accumulation_dtype


COLUMNS = ("ratio/geometric_bias", "ratio/geometric_bias_bound")


@dataclass(frozen=True)
class SegmentRatios:
    """
    Three ratios of each segment, all `(B, M)`, float32 or wider; columns beyond a row's count are not meaningful.

    Args:
        geometric (`torch.Tensor`): geometric mean of the tokens' ratios, which SAPO's loss uses.
        arithmetic (`torch.Tensor`): their arithmetic mean.
        product (`torch.Tensor`): their product, the ratio of the segment's probabilities; may be inf.
        bias (`torch.Tensor`): `arithmetic - geometric`, computed without cancellation.
        bound (`torch.Tensor`): at least `bias`.
        exists (`torch.Tensor`): bool, the columns within a row's count.
    """

    geometric: torch.Tensor
    arithmetic: torch.Tensor
    product: torch.Tensor
    bias: torch.Tensor
    bound: torch.Tensor
    exists: torch.Tensor


def segment_ratios(log_ratio: torch.Tensor, segments: Segments) -> SegmentRatios:
    """
    Compare the ways to give a segment one ratio.

    Args:
        log_ratio (`torch.Tensor`): float tensor of shape `(B, T)`, each token's own log-ratio.
        segments ([`Segments`]): the partition of the tokens.

    Returns:
        [`SegmentRatios`]
    """
    log_ratio = torch.where(segments.mask, log_ratio.to(accumulation_dtype(log_ratio)), 0)
    bias, bound = geometric_bias(log_ratio, segments)
    geometric = torch.exp(segments.mean(log_ratio))
    return SegmentRatios(
        geometric=geometric,
        arithmetic=geometric + bias,
        product=torch.exp(segments.sum(log_ratio)),
        bias=bias,
        bound=bound,
        exists=segments.lengths > 0,
    )


def logged_bias(log: pd.DataFrame) -> pd.DataFrame:
    """
    The bias and its bound as a run has logged them.

    Args:
        log (`pd.DataFrame`): from [`~sapo_trl.analysis.read_log_history`].

    Returns:
        `pd.DataFrame`: `step`, `bias`, `bound`, and `ratio_mean` where it was logged, one row per logged update.

    Raises:
        ValueError: if the log lacks them, or if they are no numbers.
    """
    for name in ("step", *COLUMNS):
        if name not in log:
            raise ValueError(
                f"`{name}` is not in the log: it is logged with a ratio per segment or sequence, "
                '`ratio_reduction="mean"` and one of this package\'s losses.'
            )
    names = {"step": "step", COLUMNS[0]: "bias", COLUMNS[1]: "bound", "ratio/mean": "ratio_mean"}
    for name in names:
        if name in log and not pd.api.types.is_numeric_dtype(log[name]):
            raise ValueError(f"`{name}` in the log must be a number in every entry.")
    table = log[[name for name in names if name in log]].rename(columns=names)
    return table.dropna(subset=["bias", "bound"]).reset_index(drop=True)
