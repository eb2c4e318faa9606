"""Baselines without reinforcement learning, as thin recipes over TRL's trainers: ReST-EM and DPO-Positive."""

from .dpop import DPOPConfig, DPOPTrainer, dpop_trainer, preference_pairs
from .restem import ReSTEM, ReSTEMConfig, kept_rows
from .sampling import SamplingConfig, sample_responses


__all__ = [
    "DPOPConfig",
    "DPOPTrainer",
    "ReSTEM",
    "ReSTEMConfig",
    "SamplingConfig",
    "dpop_trainer",
    "kept_rows",
    "preference_pairs",
    "sample_responses",
]
