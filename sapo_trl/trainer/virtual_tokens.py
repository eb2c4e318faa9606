"""Virtual tokens of prompt tuning, p-tuning and prefix tuning: their positions, and their columns in outputs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .padding import token_positions


def place_virtual_tokens(policy: PeftModel) -> None:
    """
    Let a policy's virtual tokens stand directly before each row's first token, in generation and in training.

    PEFT puts them before the padding and drops position ids. The distance to the prompt would be the padding, and
    change with the other rows of a batch.

    Args:
        policy ([`~peft.PeftModel`]): with an adapter that has virtual tokens.
    """
    backbone = policy.get_base_model().base_model
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        backbone.register_forward_pre_hook(_count_tokens, with_kwargs=True)


def _count_tokens(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    mask, tokens = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    tokens = kwargs.get("input_ids", args[0] if args else None) if tokens is None else tokens
    if torch.is_tensor(mask) and mask.ndim == 2 and tokens is not None:
        # With a cache, the mask also covers the tokens and keys before this forward's tokens.
        kwargs = {**kwargs, "position_ids": token_positions(mask)[:, -tokens.size(1) :]}
    return args, kwargs


def real_columns(outputs: Any, width: int) -> Any:
    """TRL's fused outputs, `width` of them in each row, without the outputs at virtual tokens in front."""
    first = outputs.log_probs.size(1) - width
    if first > 0:
        outputs.log_probs = outputs.log_probs[:, first:]
        if getattr(outputs, "entropy", None) is not None:
            outputs.entropy = outputs.entropy[:, first:]
    return outputs
