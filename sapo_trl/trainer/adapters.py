"""The policy's adapters: errors for adapters that cannot be trained as asked, and their dropout."""

from __future__ import annotations

import logging
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import disable_dropout_in_model

from ..config import SAPOConfig
from ..critic.adapter import ADAPTER_NAME
from ..critic.adapter_config import critic_config
from ..generation.prompt_learning import let_peft_find_the_cache
from .virtual_tokens import place_virtual_tokens


logger = logging.getLogger(__name__)

# Initialisations that move a part of the base weights into the adapter (names begin so).
_MOVE_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Initialisations by random numbers or by data: another one leaves another base model.
_ARE_NOT_REPEATABLE = ("pissa_niter", "corda", "lora_ga")
_NOT_TRAINED = {
    "MULTITASK_PROMPT_TUNING": "asks for the number of each row's task",
    "POLY": "asks for the number of each row's task",
    "CPT": "needs logits, which TRL's LM head does not return",
    "ADAPTION_PROMPT": "does not run TRL's LM head",
    "XLORA": "allows no cache, which generation needs",
}
_KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")
_OWN_BASE = "or save the base model that it leaves, and the adapter with init_lora_weights=True (see docs/how_to.md)"


def check_adapters(model: Any, peft_config: PeftConfig | None, args: SAPOConfig) -> None:
    """
    Args:
        model: the policy, or its name.
        peft_config ([`~peft.PeftConfig`], *optional*): of the adapter that TRL will put into it.
        args ([`SAPOConfig`]): settings of the run.

    Raises:
        ValueError: if an adapter cannot be trained, saved, or compared with a reference.
    """
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        return  # TRL says so
    configs: dict[str, Any] = {"default": peft_config} if peft_config else dict(getattr(model, "peft_config", {}))
    active = "default" if peft_config else getattr(model, "active_adapter", None)
    if args.learns_critic and ADAPTER_NAME in configs and (args.critic != "adapter" or active == ADAPTER_NAME):
        raise ValueError(
            f"The policy has an adapter named {ADAPTER_NAME!r}, and critic={args.critic!r} needs this name for the "
            'critic: in checkpoints both would be in the folder "critic". Load the adapter under another name, such '
            'as `PeftModel.from_pretrained(base, folder, adapter_name="default")`.'
        )
    for name, config in configs.items():
        if name != ADAPTER_NAME:
            _check_adapter(config, args, is_copied=isinstance(model, PeftModel))
    if args.critic == "adapter" and active in configs:
        critic_config(configs[active])


def _check_adapter(config: PeftConfig, args: SAPOConfig, is_copied: bool) -> None:
    """`is_copied`: whether TRL's reference is a second adapter with this configuration."""
    kind = PeftType(config.peft_type).value
    if kind in _NOT_TRAINED:
        raise ValueError(
            f"The policy's adapter is of type {kind}, which {_NOT_TRAINED[kind]}: TRL cannot train it. "
            "Use LoRA, or prompt tuning for virtual tokens."
        )
    if config.is_prompt_learning and args.use_vllm:
        raise ValueError(
            f"The policy's adapter is of type {kind}, and with use_vllm=True the engine is sent "
            "merged weights: virtual tokens cannot be merged. Set use_vllm=False or use LoRA."
        )
    if kind in _KEYS_AND_VALUES and args.gradient_checkpointing:
        raise ValueError(
            f"The policy's adapter is of type {kind}, whose virtual tokens are cached keys and "
            "values, and gradient_checkpointing=True drops the cache: set gradient_checkpointing=False, or use "
            "prompt tuning or LoRA."
        )
    start = str(getattr(config, "init_lora_weights", "")).lower()
    if start.startswith(_ARE_NOT_REPEATABLE):
        raise ValueError(
            f"init_lora_weights={start!r} changes the base model in a way that PEFT cannot repeat, so the saved "
            f'adapter would load as another policy: use "pissa", "olora" or True, {_OWN_BASE}.'
        )
    if args.beta == 0.0:
        return
    with_beta = f"with beta={args.beta}"
    if start.startswith(_MOVE_WEIGHTS):
        raise ValueError(
            f"init_lora_weights={start!r} moves a part of the base weights into the adapter, and {with_beta} the "
            f"reference is the rest, without adapter: a broken model. Set beta=0.0 or init_lora_weights=True, "
            f"{_OWN_BASE}."
        )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"bias={config.bias!r} trains biases of the base model, and {with_beta} the reference has the same "
            'biases: it would move with the policy. Set beta=0.0 or bias="none".'
        )
    for name in ("layer_replication", "kasa_config"):
        if is_copied and getattr(config, name, None):
            raise ValueError(
                f"The policy's adapter has `{name}`, and {with_beta} TRL copies the adapter to the reference: PEFT "
                "would change the base model once more. Set beta=0.0, or pass the base model with a `peft_config`."
            )


def prepare_adapters(policy: PreTrainedModel | PeftModel, args: SAPOConfig) -> None:
    """
    Complete TRL's preparations of a policy's adapters: the places of virtual tokens, and `disable_dropout`.

    Args:
        policy ([`~transformers.PreTrainedModel`]): without wrappers.
        args ([`SAPOConfig`]): settings of the run.

    Raises:
        ValueError: for virtual tokens in a model that takes images, or trained tokens of a tied LM head.
    """
    if args.disable_dropout:
        disable_dropout(policy)
    if not isinstance(policy, PeftModel):
        return
    if isinstance(policy.get_base_model().get_output_embeddings(), TrainableTokensWrapper):
        raise ValueError(
            "The policy's adapter has `trainable_token_indices`, and its embeddings are also the LM head, which TRL "
            'reads without these tokens: untie them before training, or train all embeddings with `modules_to_save=["'
            'embed_tokens", "lm_head"]`.'
        )
    if not policy.active_peft_config.is_prompt_learning:
        return
    config = policy.active_peft_config
    kind = PeftType(config.peft_type).value
    if getattr(policy.config, "vision_config", None) is not None:
        raise ValueError(
            f"The policy's adapter is of type {kind}, whose virtual tokens move the columns of the tokens, and "
            f"a model of type {policy.config.model_type!r} finds the places of images by columns. Use LoRA."
        )
    if kind == "P_TUNING" or getattr(config, "prefix_projection", False):
        logger.warning(
            "The policy's adapter is of type %s with an encoder. PEFT saves the output of the encoder, not its "
            "weights: the saved policy can be used, but no run can be resumed from a checkpoint.",
            kind,
        )
    place_virtual_tokens(policy)
    let_peft_find_the_cache(policy)


def disable_dropout(model: nn.Module) -> None:
    """Set all dropout of a model and its adapters to 0."""
    disable_dropout_in_model(model)
    for module in model.modules():
        # Adapters of some types drop out by layers of PEFT's own, or by a number for each adapter.
        if "Dropout" in type(module).__name__ and isinstance(getattr(module, "p", None), float):
            module.p = 0.0
        if isinstance(module, BaseTunerLayer):
            for name in ("rank_dropout", "module_dropout"):
                rates = getattr(module, name, None)
                if isinstance(rates, dict) and all(isinstance(rate, int | float) for rate in rates.values()):
                    rates.update(dict.fromkeys(rates, 0.0))
