"""
The recorded files of a run: their columns, writing and reading.

A [`~sapo_trl.SegmentationCallback`] writes `segments_*`, `ratios_*` and images; a [`~sapo_trl.ValueDiagnostics`]
writes `values_*`. Each has one file per rollout and process, in Parquet or as one JSON object per line.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .log import read_log_history
    from .reading import read_responses, read_values
    from .run import Recording, read_recording
    from .writing import segmented_responses


__all__ = [
    "Recording",
    "read_log_history",
    "read_recording",
    "read_responses",
    "read_values",
    "segmented_responses",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Recording": "run",
        "read_log_history": "log",
        "read_recording": "run",
        "read_responses": "reading",
        "read_values": "reading",
        "segmented_responses": "writing",
    },
)
