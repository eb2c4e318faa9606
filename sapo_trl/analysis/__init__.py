"""Analyses of finished runs: questions about segments, answered from recorded responses, values and logs."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from ..recordings.log import read_log_history
    from ..recordings.reading import read_responses, read_values
    from .borders import BorderAgreement, border_agreement
    from .gradient_variance import GradientNoise, GradientVariance
    from .lift import LiftCurve, lift_curve, token_jumps, trend_test, valued_state_jumps
    from .ratio_bias import SegmentRatios, segment_ratios


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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BorderAgreement": "borders",
        "GradientNoise": "gradient_variance",
        "GradientVariance": "gradient_variance",
        "LiftCurve": "lift",
        "SegmentRatios": "ratio_bias",
        "border_agreement": "borders",
        "lift_curve": "lift",
        "read_log_history": ".recordings.log",
        "read_responses": ".recordings.reading",
        "read_values": ".recordings.reading",
        "segment_ratios": "ratio_bias",
        "token_jumps": "lift",
        "trend_test": "lift",
        "valued_state_jumps": "lift",
    },
)
