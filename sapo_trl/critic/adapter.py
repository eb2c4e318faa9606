"""A critic's adapter: a second adapter on the policy's base model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel

from ..distributed import sharded_like
from .adapter_config import critic_config


ADAPTER_NAME = "critic"
_METHOD = "critic_hidden_states"


class _Switched(NamedTuple):
    """The modules that switching may change, found while the policy had these adapters. PEFT walks through them."""

    adapters: tuple[str, ...]
    found: list[nn.Module]

    def modules(self) -> Iterator[nn.Module]:
        return iter(self.found)


class CriticAdapter:
    """
    The critic's share of a policy with adapters.

    The base model is frozen and in memory once. Policy and critic are adapters on it; one adapter is active at a time.
    Outside of [`CriticAdapter.active`] the policy's adapter is active, and the critic's parameters require no
    gradient: they are in no optimizer, gradient synchronisation or merge of the policy's.

    Args:
        policy ([`~peft.PeftModel`]): the policy. Gets an adapter named `"critic"` unless it has one.
        config ([`~peft.PeftConfig`], *optional*):
            configuration of the policy's adapter, by default of its active one. The critic's adapter gets a copy,
            see [`~sapo_trl.critic.adapter_config.critic_config`].
    """

    def __init__(self, policy: PeftModel, config: PeftConfig | None = None):
        if not isinstance(policy, PeftModel):
            raise TypeError(
                'A critic of mode "adapter" lives beside the policy\'s adapter: the policy must be a `PeftModel` '
                f"(pass `peft_config`), got {type(policy).__name__}."
            )
        active = policy.active_adapter
        if active == ADAPTER_NAME:
            raise ValueError(
                f"The policy's own adapter is named {ADAPTER_NAME!r}, the name of the critic's: load it under another "
                'name, such as `PeftModel.from_pretrained(base, folder, adapter_name="default")`.'
            )
        self.policy = policy
        self._switched = _Switched((), [])
        if ADAPTER_NAME not in policy.peft_config:
            policy.add_adapter(ADAPTER_NAME, critic_config(config or policy.peft_config[active]))
            # Adding an adapter may have made it trainable.
            policy.set_adapter(active)

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformer under the LM head, with the adapter that is active."""
        return self.policy.get_base_model().base_model

    def hidden_states(self, **model_inputs) -> torch.Tensor:
        """Last hidden states of the backbone, float `(B, S, H)`, with the active adapter."""
        if not isinstance(self.policy, FSDPModule):
            return self.backbone(**model_inputs).last_hidden_state
        # FSDP2 gathers the weights for calls of the whole policy and of registered methods.
        if not hasattr(self.policy, _METHOD):
            setattr(self.policy, _METHOD, lambda **inputs: self.backbone(**inputs).last_hidden_state)
            register_fsdp_forward_method(self.policy, _METHOD)
        return getattr(self.policy, _METHOD)(**model_inputs)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """
        Run forwards and their backwards with the critic's adapter. Afterwards the policy's adapter is active again.

        The backward belongs inside because gradient checkpointing runs the forward again.
        """
        before = self.policy.active_adapter
        if before == ADAPTER_NAME:  # a nested forward
            yield
            return
        self._switch(ADAPTER_NAME)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str) -> None:
        """
        [`~peft.PeftModel.set_adapter`], without its two walks through all of the model's modules.

        They take longer than the switching itself, and a micro-batch switches four times.
        """
        tuner = self.policy.base_model
        if type(tuner).set_adapter is not BaseTuner.set_adapter:
            self.policy.set_adapter(name)
            return
        adapters = tuple(self.policy.peft_config)
        if self._switched.adapters != adapters:
            found = [module for module in tuner.model.modules() if hasattr(module, "set_adapter")]
            self._switched = _Switched(adapters, found)
        set_adapter(self._switched, name, layer_cls=tuner.tuner_layer_cls)
        tuner.active_adapter = self.policy.active_adapter = name

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's parameters, by their names in the policy."""
        for name, parameter in self.policy.named_parameters():
            if f".{ADAPTER_NAME}." in name or name.endswith(f".{ADAPTER_NAME}"):
                yield name, parameter

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The adapter's weights, by PEFT's names in files."""
        return get_peft_model_state_dict(self.policy, adapter_name=ADAPTER_NAME)

    def save(self, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """
        Write the adapter as PEFT does, so that `PeftModel.from_pretrained(base_model, folder)` loads it.

        Args:
            folder (`str` or `Path`): an existing folder.
            state (`dict[str, torch.Tensor]`, *optional*): weights to write instead of `state_dict()`.
        """
        folder = Path(folder)
        state = self.state_dict() if state is None else state
        # Copies: adapters of some types, such as RandLora, have one tensor in many layers, and files refuse that.
        state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
        save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config = copy.deepcopy(self.policy.peft_config[ADAPTER_NAME])
        config.inference_mode = True
        config.base_model_name_or_path = config.base_model_name_or_path or self.policy.get_base_model().name_or_path
        config.save_pretrained(folder)

    def load(self, folder: str | Path) -> None:
        """Read the adapter's weights back."""
        state = load_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME)
        own = self.state_dict()
        state = {name: sharded_like(tensor, own[name]) if name in own else tensor for name, tensor in state.items()}
        result = set_peft_model_state_dict(self.policy, state, adapter_name=ADAPTER_NAME)
        if result.unexpected_keys:
            raise ValueError(
                f"The critic's adapter in {str(folder)!r} does not fit the policy: {len(result.unexpected_keys)} of "
                f"its {len(state)} tensors have no place, for example {sorted(result.unexpected_keys)[0]!r}."
            )
