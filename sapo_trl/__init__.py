"""
Segment-Aligned Policy Optimization (SAPO, https://huggingface.co/papers/2605.01327) as a TRL trainer.

Not Qwen's *Soft Adaptive* Policy Optimization, which TRL calls `loss_type="sapo"`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy_names


if TYPE_CHECKING:
    from .callbacks.diagnostics import ValueDiagnostics
    from .callbacks.rollout import RolloutCallback
    from .callbacks.segmentation import SegmentationCallback
    from .callbacks.stop_on_signal import StopOnSignal
    from .config import SAPOConfig
    from .critic.value_head import SegmentValueHead
    from .presets import PRESETS
    from .segments import Segments
    from .trainer import SAPOTrainer


__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "RolloutCallback",
    "SAPOConfig",
    "SAPOTrainer",
    "SegmentValueHead",
    "SegmentationCallback",
    "Segments",
    "StopOnSignal",
    "ValueDiagnostics",
]

# `from sapo_trl.segments import Segments` must not load TRL, nor `sapo-trl --help` torch.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PRESETS": "presets",
        "RolloutCallback": "callbacks.rollout",
        "SAPOConfig": "config",
        "SAPOTrainer": "trainer",
        "SegmentValueHead": "critic.value_head",
        "SegmentationCallback": "callbacks.segmentation",
        "Segments": "segments",
        "StopOnSignal": "callbacks.stop_on_signal",
        "ValueDiagnostics": "callbacks.diagnostics",
    },
)
