"""
Segment-Aligned Policy Optimization (SAPO, https://huggingface.co/papers/2605.01327) as a TRL trainer.

Not Qwen's *Soft Adaptive* Policy Optimization, which TRL calls `loss_type="sapo"`.
"""

from .callbacks import RolloutCallback, SegmentationCallback
from .config import SAPOConfig
from .diagnostics import ValueDiagnostics
from .presets import PRESETS
from .segments import Segments
from .stop_on_signal import StopOnSignal
from .trainer import SAPOTrainer
from .value_head import SegmentValueHead


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
