"""The critic: a scalar head on a transformer backbone without LM head."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, PeftType
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import cached_file

from ..distributed import gathered_state, sharded_like
from ..segments import accumulation_dtype
from .adapter import CriticAdapter
from .output import ValueOutput


HEAD_WEIGHTS_NAME = "value_head.safetensors"
HEAD_CONFIG_NAME = "value_head.json"
MODES = ("separate", "shared", "adapter")


class _Float32Linear(nn.Linear):
    """A linear layer that computes in float32 or wider, even if its weights are stored or gathered in less."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Autocast would compute in half precision.
        with torch.autocast(x.device.type, enabled=False):
            dtype = accumulation_dtype(x)
            return nn.functional.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class SegmentValueHead(nn.Module):
    """
    Values of a policy's states.

    A position's value is read from the hidden state after that position's token, so `values[:, p]` is the value of the
    state *after* token `p`; the value of the state before token `p` is `values[:, p - 1]`. Values are per position.
    The partition, not this class, decides which of them stand for a segment.

    Args:
        hidden_size (`int`): width of the hidden states.
        backbone ([`~transformers.PreTrainedModel`], *optional*):
            text or image-text model without LM head that returns `last_hidden_state`. `None` makes a `"shared"`
            critic, which reads the policy's hidden states.
        adapter ([`~sapo_trl.critic.adapter.CriticAdapter`], *optional*):
            instead of a backbone: the critic's adapter on the policy's base model.

    Example:

    ```python
    >>> critic = SegmentValueHead.from_policy(policy)  # its own copy of the policy's backbone
    >>> values = critic(input_ids=input_ids, attention_mask=attention_mask)  # (batch, length), float32
    >>> critic.save_pretrained("critic")
    >>> critic = SegmentValueHead.from_pretrained("critic")
    ```
    """

    def __init__(
        self,
        hidden_size: int,
        backbone: PreTrainedModel | None = None,
        adapter: CriticAdapter | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        # Not an `nn.Module`: the policy that it refers to is no part of the critic.
        self.adapter = adapter
        # float32 for any dtype of the backbone: values are regression targets, and bf16 has three digits.
        self.head = _Float32Linear(hidden_size, 1, dtype=torch.float32)
        # Values start close to 0 (std 0.1 on normalised hidden states) but not at 0, where the head would pass no
        # gradient on to the backbone.
        nn.init.normal_(self.head.weight, std=0.1 / hidden_size**0.5)
        nn.init.zeros_(self.head.bias)
        self.output = ValueOutput()

    @property
    def mode(self) -> str:
        """
        `"separate"`: with a backbone of its own; `"shared"`: on the policy's detached hidden states; `"adapter"`: with
        an adapter of its own on the policy's base model.
        """
        if self.adapter is not None:
            return "adapter"
        return "shared" if self.backbone is None else "separate"

    def learned_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the critic's optimizer, by name."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield name, parameter
        if self.adapter is not None:
            yield from self.adapter.named_parameters()

    def active(self) -> contextlib.AbstractContextManager:
        """Context for forwards and backwards, see [`~sapo_trl.critic.adapter.CriticAdapter.active`]."""
        return contextlib.nullcontext() if self.adapter is None else self.adapter.active()

    @classmethod
    def from_policy(cls, policy: PreTrainedModel, mode: str = "separate") -> SegmentValueHead:
        """
        Make a critic for a policy, initialised from it.

        Args:
            policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                causal LM or image-text model. Adapters are merged into the critic's copy; virtual tokens are left out.
            mode (`str`, *optional*, defaults to `"separate"`):
                `"separate"`: copy the policy's backbone, frozen parameters staying frozen (the paper); `"shared"`:
                only a head, on the policy's hidden states; `"adapter"`: a second adapter on the base model of a policy
                with an adapter.

        Returns:
            [`SegmentValueHead`]
        """
        _check_mode(mode)
        if mode == "shared":
            return cls(hidden_size_of(backbone_of(policy)))
        if mode == "adapter":
            adapter = CriticAdapter(policy)
            return cls(hidden_size_of(adapter.backbone), adapter=adapter)
        if getattr(policy, "is_quantized", False):
            raise ValueError(
                'A quantized policy cannot be copied into a trainable critic: use `critic="adapter"` or '
                '`critic="shared"`, or pass a `value_model` loaded in a floating-point dtype.'
            )
        if any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
            raise ValueError(
                "The policy was loaded in pieces (ZeRO-3, `zero3_init_flag: true`), and a separate critic cannot be "
                "copied from them: pass `model` as the name of a folder or of a model on the Hub, so that both are "
                'loaded, or pass a `value_model`, or use `critic="shared"`.'
            )
        if _is_peft_model(policy):
            backbone = _merged_backbone(policy).requires_grad_(True)
        else:
            backbone = copy.deepcopy(backbone_of(policy))
        return cls(hidden_size_of(backbone), backbone)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, mode: str | None = None, policy: PeftModel | None = None, **kwargs
    ) -> SegmentValueHead:
        """
        Load a saved critic, or make one from a policy's checkpoint.

        Args:
            path (`str` or `Path`):
                folder or hub id of a critic written by [`SegmentValueHead.save_pretrained`]. It may also be of any
                causal LM, image-text model or backbone; then the head is new.
            mode (`str`, *optional*):
                `"separate"`, `"shared"` or `"adapter"`; by default the saved critic's, or `"separate"`. A saved critic
                of another mode is an error.
            policy ([`~peft.PeftModel`], *optional*):
                for a critic of mode `"adapter"`: a policy on the base model that the critic was trained with.
            kwargs: passed to [`~transformers.AutoModel.from_pretrained`], e.g. `dtype` or `attn_implementation`.

        Returns:
            [`SegmentValueHead`]
        """
        if mode is not None:
            _check_mode(mode)
        config_file = _resolve(path, HEAD_CONFIG_NAME)
        if config_file is None and mode == "shared":
            known = {name: kwargs[name] for name in ("revision", "trust_remote_code") if name in kwargs}
            return cls(AutoConfig.from_pretrained(path, **known).get_text_config().hidden_size)
        if config_file is None:
            backbone = AutoModel.from_pretrained(path, **kwargs)
            return cls(hidden_size_of(backbone), backbone)
        config = json.loads(Path(config_file).read_text())
        if mode is not None and mode != config["mode"]:
            raise ValueError(f"The critic in {str(path)!r} was saved in mode {config['mode']!r}, not {mode!r}.")
        if config["mode"] == "adapter":
            if policy is None:
                raise ValueError(
                    f"The critic in {str(path)!r} is an adapter on its policy's base model: pass the `policy`."
                )
            critic = cls.from_policy(policy, mode="adapter")
            critic.output = ValueOutput.saved(config)
            critic.load_weights(path)
            return critic
        backbone = AutoModel.from_pretrained(path, **kwargs) if config["mode"] == "separate" else None
        critic = cls(config["hidden_size"], backbone)
        critic.head.load_state_dict(load_file(_resolve(path, HEAD_WEIGHTS_NAME)))
        critic.output = ValueOutput.saved(config)
        return critic

    def load_weights(self, path: str | Path) -> None:
        """
        Read the weights of a saved critic of the same mode into this one.

        Args:
            path (`str` or `Path`): folder written by [`SegmentValueHead.save_pretrained`].
        """
        self.load_output(path)
        if self.adapter is None:
            own = self.state_dict()
            saved = type(self).from_pretrained(path, mode=self.mode).state_dict()
            self.load_state_dict({name: sharded_like(tensor, own[name]) for name, tensor in saved.items()})
            return
        self.head.load_state_dict(load_file(_resolve(path, HEAD_WEIGHTS_NAME)))
        self.adapter.load(path)

    def load_output(self, path: str | Path) -> None:
        """
        Read the numbers between a saved head's output and its values.

        Args:
            path (`str` or `Path`): folder written by [`SegmentValueHead.save_pretrained`].

        Raises:
            ValueError: if the saved critic has another range of values.
        """
        saved = ValueOutput.saved(json.loads(Path(_resolve(path, HEAD_CONFIG_NAME)).read_text()))
        saved.set_range(self.output.value_range)
        self.output = saved

    def save_pretrained(self, path: str | Path, is_main_process: bool = True) -> None:
        """
        Write the critic to a folder: the backbone in transformers' format (or the adapter in PEFT's), the head in
        safetensors beside it.

        Args:
            path (`str` or `Path`): folder, made if missing.
            is_main_process (`bool`, *optional*, defaults to `True`):
                whether this process writes. With weights sharded by FSDP2 all processes must call this, and one must
                write.
        """
        path = Path(path)
        state = gathered_state(self.state_dict(), keep=is_main_process)
        adapter_state = gathered_state(self.adapter.state_dict(), keep=is_main_process) if self.adapter else None
        if not is_main_process:
            return
        path.mkdir(parents=True, exist_ok=True)
        if self.backbone is not None:
            self.backbone.save_pretrained(path, state_dict=_below("backbone.", state))
        if self.adapter is not None:
            self.adapter.save(path, adapter_state)
        save_file(_below("head.", state), path / HEAD_WEIGHTS_NAME)
        config = {"mode": self.mode, "hidden_size": self.head.in_features, **self.output.settings()}
        (path / HEAD_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")

    def forward(self, *, hidden_states: torch.Tensor | None = None, **model_inputs) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`, *optional*):
                float tensor of shape `(B, S, H)` to read instead of running the backbone; required in `"shared"` mode.
            model_inputs: `input_ids`, `attention_mask` and the backbone's other inputs (images).

        Returns:
            `torch.Tensor`: float32 `(B, S)`, the value after each position.
        """
        if hidden_states is None:
            if self.mode == "shared":
                raise ValueError('A "shared" critic has no backbone: pass the policy\'s `hidden_states`.')
            with self.active():
                if self.adapter is not None:
                    hidden_states = self.adapter.hidden_states(**model_inputs, use_cache=False)
                else:
                    hidden_states = self.backbone(**model_inputs, use_cache=False).last_hidden_state
        # Clone: FSDP2 cannot hook into the backward of a view that is changed in place.
        return self.output(self.head(hidden_states).squeeze(-1).clone())


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The transformer under a model's LM head; adapters, if any, are part of it."""
    if _is_peft_model(model):
        model = model.get_base_model()
    return model.base_model


def hidden_size_of(model: PreTrainedModel) -> int:
    """Width of a text or image-text model's hidden states."""
    return model.config.get_text_config().hidden_size


def _merged_backbone(policy: PeftModel) -> PreTrainedModel:
    """A copy of the policy's backbone, with its adapter merged in. Virtual tokens are left out."""
    config = policy.peft_config[policy.active_adapter]
    if config.is_prompt_learning:
        return copy.deepcopy(backbone_of(policy))
    merged = copy.deepcopy(policy)
    try:
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError("`alora_invocation_tokens` acts on a part of a row.")
        return backbone_of(merged.merge_and_unload())
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"The policy's adapter, of type {PeftType(config.peft_type).value}, cannot be merged into the critic's "
            f'copy of the policy: pass a `value_model`, or use `critic="shared"`. PEFT says: {error}'
        ) from error


def _is_peft_model(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of a state dict under a prefix, without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}, got {mode!r}.")


def _resolve(path: str | Path, filename: str) -> str | None:
    return cached_file(path, filename, _raise_exceptions_for_missing_entries=False)
