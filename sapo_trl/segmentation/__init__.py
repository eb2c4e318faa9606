"""
Segmenters: where to cut a response.

A segmenter is any callable `(entropies, mask) -> Segments`. If it also names `logps`, `completion_ids` or `tokenizer`
among its parameters, it gets them too; see [`Segmenter`]. All its inputs come from the policy that produced the
rollout.
"""

from ..segments import Segments
from .entropy import (
    CutpointSegmenter,
    EntropySegmenter,
    ProbabilitySegmenter,
    SequenceSegmenter,
    TokenSegmenter,
    check_top_percent,
    entropy_segments,
    is_uncertain,
)
from .noise import (
    NoisyBoundaries,
    RandomCuts,
)
from .segmenter import (
    Segmenter,
    accepted_inputs,
)
from .text import (
    NewlineSegmenter,
    StepSegmenter,
    token_texts,
)


__all__ = [
    "CutpointSegmenter",
    "EntropySegmenter",
    "NewlineSegmenter",
    "NoisyBoundaries",
    "ProbabilitySegmenter",
    "RandomCuts",
    "Segmenter",
    "Segments",
    "SequenceSegmenter",
    "StepSegmenter",
    "TokenSegmenter",
    "accepted_inputs",
    "check_top_percent",
    "entropy_segments",
    "is_uncertain",
    "token_texts",
]
