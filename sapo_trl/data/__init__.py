"""Data sets in the form that TRL trains on."""

from .geometry import geometry_prompt, to_prompts


__all__ = ["geometry_prompt", "to_prompts"]
