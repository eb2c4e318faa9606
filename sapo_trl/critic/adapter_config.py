"""The configuration of a critic's adapter, from the policy's: each field is copied, reset or refused."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftConfig, PeftType


# Initialisations that leave the base model as it is and need no data. All other ones have a name of their own.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal")

# Fields that act on the base model while an adapter is added, or that belong to the policy alone. The critic's adapter
# gets these values instead. All fields that are not named in this file describe the shape of an adapter (`r`,
# `target_modules`, `rank_pattern`, …), its random numbers or its dropout, and are copied.
_RESET: dict[str, Any] = {
    # Whole copies of modules, such as an LM head, are the policy's. A sampler would also receive the critic's.
    "modules_to_save": None,
    "modules_to_tie": None,
    "ensure_weight_tying": False,
    # The layers are replicated by now: PEFT would do it again.
    "layer_replication": None,
    # Details of initialisations that are not copied.
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    # The policy's adapter may have been loaded for inference. The critic's is trained.
    "inference_mode": False,
}

_REASONS = {
    "ADALORA": "PEFT trains one adapter of this type in a model",
    "XLORA": "it mixes adapters by a forward of the whole policy",
    "POLY": "it needs the numbers of tasks",
    "SHADOW": "its forward keeps the policy's state between the layers",
    "ADAPTION_PROMPT": "PEFT keeps its weights under one name for all adapters",
}


def critic_config(config: PeftConfig) -> PeftConfig:
    """
    Args:
        config ([`~peft.PeftConfig`]): of the policy's adapter.

    Returns:
        [`~peft.PeftConfig`]: a copy for a second adapter, which leaves the base model and the policy as they are.

    Raises:
        ValueError: if the policy's adapter allows no second adapter.
    """
    refused = _refused(config)
    if refused is not None:
        raise ValueError(
            f'`critic="adapter"` puts a second adapter beside the policy\'s, which this adapter does not allow: '
            f'{refused}. Use LoRA without this setting, or `critic="shared"` or `critic="separate"`.'
        )
    config = copy.deepcopy(config)
    for name, value in _RESET.items():
        if hasattr(config, name):
            setattr(config, name, copy.copy(value))
    if getattr(config, "init_lora_weights", True) not in _PLAIN_INITIALISATIONS:
        # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA would put a part of the base weights into the critic's adapter, and
        # take it away from the policy. EVA needs data.
        config.init_lora_weights = True
    return config


def _refused(config: PeftConfig) -> str | None:
    """The setting that allows no second adapter, with the reason; `None` without one."""
    kind = PeftType(config.peft_type).value
    if config.is_prompt_learning:
        return f"{kind} has virtual tokens, which only a forward of the whole policy reads"
    if kind in _REASONS:
        return f"{kind}, because {_REASONS[kind]}"
    if getattr(config, "bias", "none") != "none":
        return f"bias={config.bias!r} trains the base model's biases, which both adapters would share"
    if getattr(config, "alora_invocation_tokens", None):
        return (
            f"alora_invocation_tokens={config.alora_invocation_tokens!r}, which only a forward of the whole policy "
            "looks for"
        )
    for name, reason in (
        ("kasa_config", "which cuts singular values off the base weights for each adapter"),
        ("arrow_config", "which mixes adapters"),
    ):
        if getattr(config, name, None) is not None:
            return f"`{name}`, {reason}"
    return None
