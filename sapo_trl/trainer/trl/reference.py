"""A reference for a policy that exists in memory only: TRL loads references by name."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model, get_config_model_id

from ...config import SAPOConfig


def copy_for_reference(
    model: str | PreTrainedModel, args: SAPOConfig | None, peft_config: Any
) -> PreTrainedModel | None:
    """A frozen copy of a policy that exists in memory only and needs a reference; otherwise `None`."""
    if isinstance(model, str) or args is None or args.beta == 0.0 or peft_config is not None:
        return None
    if hasattr(model, "peft_config") or get_config_model_id(model.config):
        return None
    if args.sync_ref_model:
        raise ValueError(
            "`sync_ref_model=True` needs a model that was loaded from a folder or the Hub: save this one first."
        )
    return copy.deepcopy(model).requires_grad_(False).eval()


@contextlib.contextmanager
def no_reference_by_name(args: SAPOConfig, apply: bool) -> Iterator[None]:
    """Keep TRL from loading a reference, if one has been copied."""
    beta = args.beta if args is not None else None
    if apply:
        args.beta = 0.0
    try:
        yield
    finally:
        if apply:
            args.beta = beta


def prepared_reference(reference: PreTrainedModel, args: SAPOConfig, accelerator: Accelerator) -> PreTrainedModel:
    """The copy as TRL prepares a reference that it has loaded."""
    if args.disable_dropout:
        disable_dropout_in_model(reference)
    add_fused_lm_head(reference, temperature=args.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        return prepare_deepspeed(reference, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(reference, accelerator)
    return accelerator.prepare_model(reference, evaluation_mode=True)
