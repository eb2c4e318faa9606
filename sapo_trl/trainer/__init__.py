"""The trainer."""

from .sapo_trainer import SAPOTrainer


__all__ = ["SAPOTrainer"]
