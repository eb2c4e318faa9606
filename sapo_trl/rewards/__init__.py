"""Verifiable rewards, in the form that TRL's trainers call."""

from .accuracy import accuracy_reward
from .choices import multiple_choice_reward
from .format import format_reward, role_format_reward, step_format_reward
from .geo3k import geo3k_reward
from .numbers import numeric_reward


# Reward functions alone: `sapo-trl train` takes these names.
__all__ = [
    "accuracy_reward",
    "format_reward",
    "geo3k_reward",
    "multiple_choice_reward",
    "numeric_reward",
    "role_format_reward",
    "step_format_reward",
]
