"""The former place of these names."""

from .config import TRL_LOSS_TYPES as TRL_LOSS_TYPES
