"""
The sampling settings in a model's own `generation_config`.

If the caller leaves a setting open, transformers' `generate` takes it from there. Many of these settings change the
distribution of the next token, or cut responses. But the policy gradient assumes that responses are sampled from the
policy itself. So training must sample from the distribution of the model's forward.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedModel


# Settings that neither change the distribution nor cut a response: special tokens and details of the computation.
# Settings of beam search and of assistant models do nothing alone. `max_new_tokens` overrides `max_length`.
_HARMLESS = frozenset(
    {
        *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "max_length"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
        *("compile_config", "disable_compile", "continuous_batching_config", "transformers_version"),
        *("early_stopping", "length_penalty", "diversity_penalty", "renormalize_logits"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "max_matching_ngram_size"),
        *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
    }
)

# Settings without effect at the value 1.
_FACTORS = frozenset(
    {
        *("temperature", "top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty", "guidance_scale"),
        *("num_beams", "num_beam_groups", "num_return_sequences"),
    }
)


def shaping_settings(settings: Mapping[str, Any], temperature: float = 1.0) -> dict[str, Any]:
    """
    The settings that keep `generate` from sampling simply from the policy.

    Args:
        settings (`Mapping[str, Any]`): settings of [`~transformers.GenerationConfig`].
        temperature (`float`, *optional*, defaults to `1.0`): temperature of the policy's log-probabilities.

    Returns:
        `dict[str, Any]`: the settings that change the distribution of tokens or cut responses, except
        `max_new_tokens`.
    """
    return {name: value for name, value in settings.items() if _shapes(name, value, temperature)}


def _shapes(name: str, value: Any, temperature: float) -> bool:
    if name in _HARMLESS or name == "max_new_tokens" or value is None:
        return False
    if name == "do_sample":
        return value is False
    if name == "temperature":
        return value != temperature
    if name.startswith("forced_"):  # a token's id, which may be 0
        return True
    return value not in (0, [], {}, ()) and not (name in _FACTORS and value == 1)


def left_to_the_model(model: PreTrainedModel, generation_config: GenerationConfig) -> dict[str, Any]:
    """
    The settings of a model's `generation_config` that would reach the sampler and change its distribution.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, perhaps with adapters.
        generation_config ([`~transformers.GenerationConfig`]): the argument of `generate`.
    """
    own = getattr(model, "generation_config", None)
    if own is None:
        return {}
    left_open = {name for name in _known_settings() if getattr(generation_config, name, None) is None}
    return shaping_settings({name: value for name, value in vars(own).items() if name in left_open})


@contextlib.contextmanager
def own_settings_ignored(model: PreTrainedModel) -> Iterator[None]:
    """
    Let `generate` take only special tokens and settings of the computation from a model's `generation_config`.

    Afterwards the model gets its settings back, so that it is saved with them.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, perhaps with adapters.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    neutral = copy.deepcopy(own)
    for name in _known_settings():
        setattr(neutral, name, None)
    neutral.top_k = 0  # without a value, `generate` would take 50
    model.generation_config = neutral
    try:
        yield
    finally:
        model.generation_config = own


def _known_settings() -> set[str]:
    """All settings of transformers that are not harmless, including new ones. A model's own extra settings stay."""
    return {name for name in vars(GenerationConfig()) if not name.startswith("_")} - _HARMLESS
