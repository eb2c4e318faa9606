"""Callbacks: they see rollouts, record them, measure the critic, show progress, and end a run on a signal."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .diagnostics import ValueDiagnostics
    from .rollout import RolloutCallback
    from .segmentation import SegmentationCallback, segmented_responses
    from .stop_on_signal import StopOnSignal


__all__ = ["RolloutCallback", "SegmentationCallback", "StopOnSignal", "ValueDiagnostics", "segmented_responses"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "RolloutCallback": "rollout",
        "SegmentationCallback": "segmentation",
        "StopOnSignal": "stop_on_signal",
        "ValueDiagnostics": "diagnostics",
        "segmented_responses": "segmentation",
    },
)
