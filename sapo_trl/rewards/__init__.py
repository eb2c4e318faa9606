"""Verifiable rewards, in the form that TRL's trainers call."""

from .accuracy import accuracy_reward
from .format import format_reward


__all__ = ["accuracy_reward", "format_reward"]
