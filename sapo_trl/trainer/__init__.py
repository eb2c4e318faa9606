"""The trainer."""

from .trainer import SAPOTrainer


__all__ = ["SAPOTrainer"]
