"""Verifiable rewards, in the form that TRL's trainers call."""

from .accuracy import accuracy_reward
from .format import format_reward, role_format_reward, step_format_reward
from .geo3k import geo3k_reward


# Reward functions alone: `sapo-trl train` takes these names.
__all__ = ["accuracy_reward", "format_reward", "geo3k_reward", "role_format_reward", "step_format_reward"]
