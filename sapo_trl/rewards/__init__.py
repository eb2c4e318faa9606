"""Verifiable rewards for TRL's trainers."""

from .accuracy import accuracy_reward
from .choices import multiple_choice_reward
from .format import format_reward, role_format_reward, step_format_reward
from .geo3k import geo3k_reward
from .numbers import numeric_reward


# Only reward functions: `sapo-trl train` accepts these names.
__all__ = [
    "accuracy_reward",
    "format_reward",
    "geo3k_reward",
    "multiple_choice_reward",
    "numeric_reward",
    "role_format_reward",
    "step_format_reward",
]
