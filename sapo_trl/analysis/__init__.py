"""Analyses of finished runs: what the recorded responses, values and logs say about segments."""

from .borders import BorderAgreement, border_agreement
from .gradient_variance import GradientNoise, GradientVariance
from .lift import LiftCurve, lift_curve, token_jumps, trend_test, valued_state_jumps
from .ratio_bias import SegmentRatios, segment_ratios
from .records import read_log_history, read_responses, read_values


__all__ = [
    "BorderAgreement",
    "GradientNoise",
    "GradientVariance",
    "LiftCurve",
    "SegmentRatios",
    "border_agreement",
    "lift_curve",
    "read_log_history",
    "read_responses",
    "read_values",
    "segment_ratios",
    "token_jumps",
    "trend_test",
    "valued_state_jumps",
]
