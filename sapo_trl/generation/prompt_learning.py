"""Generation with the virtual tokens of prompt tuning, p-tuning and prefix tuning."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

from peft import PeftModel, PeftModelForCausalLM
from transformers import GenerationMixin


# transformers 5.24 renamed the cache. PEFT 0.21 asks for the old name and finds none: it would put the virtual tokens
# in front of each new token.
_RENAMED = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
PEFT_MISSES_THE_CACHE = _RENAMED and '"cache"' not in inspect.getsource(
    PeftModelForCausalLM.prepare_inputs_for_generation
)


def let_peft_find_the_cache(policy: PeftModel) -> None:
    """
    Let generation put virtual tokens in front of a row once, also with transformers 5.24.

    Args:
        policy ([`~peft.PeftModel`]): a causal LM. Without virtual tokens, or with versions of transformers and PEFT
            that agree on the name of the cache, nothing changes.
    """
    if PEFT_MISSES_THE_CACHE and policy.active_peft_config.is_prompt_learning:
        policy.prepare_inputs_for_generation = MethodType(_prepare_inputs, policy)


def _prepare_inputs(policy: PeftModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """PEFT's `prepare_inputs_for_generation`, which meets the cache under its old name."""
    prepare = policy.base_model_prepare_inputs_for_generation
    policy.base_model_prepare_inputs_for_generation = lambda *args, **kwargs: _renamed(
        prepare(*args, **kwargs), "cache", "past_key_values"
    )
    try:
        inputs = type(policy).prepare_inputs_for_generation(policy, *args, **kwargs)
    finally:
        policy.base_model_prepare_inputs_for_generation = prepare
    return _renamed(inputs, "past_key_values", "cache")


def _renamed(inputs: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: value for name, value in inputs.items()}
