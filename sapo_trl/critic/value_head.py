"""The critic: a scalar head on a transformer backbone without LM head."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..distributed import gathered_state, sharded_like
from ..segments import accumulation_dtype
from .adapter import CriticAdapter
from .ladder import Ladder, LadderSizes
from .loading import load_backbone
from .output import ValueOutput
from .policy_states import normalised, num_layers_of, read_depths


HEAD_WEIGHTS_NAME = "value_head.safetensors"
HEAD_CONFIG_NAME = "value_head.json"
LADDER_WEIGHTS_NAME = "ladder.safetensors"
MODES = ("separate", "shared", "adapter", "ladder")
READING_MODES = ("shared", "ladder")
"""Modes without a forward of their own: they read hidden states in the policy's forward."""


class _Float32Linear(nn.Linear):
    """A linear layer that computes in float32 or wider, even if its weights are stored or gathered in less."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Autocast would compute in half precision.
        with torch.autocast(x.device.type, enabled=False):
            dtype = accumulation_dtype(x)
            return nn.functional.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))

    def share(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """The share in the output of the inputs from number `first` on, without the bias."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight[:, first : first + x.size(-1)]
            dtype = accumulation_dtype(x)
            return nn.functional.linear(x.to(dtype), weight.to(dtype))


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
        reads (`int`, *optional*, defaults to `1`):
            for a `"shared"` critic: how many of the policy's hidden states it reads, see
            [`~sapo_trl.critic.policy_states.read_depths`]. It reads one as it is, and several normalised, one behind
            the other.
        ladder ([`~sapo_trl.critic.ladder.LadderSizes`], *optional*):
            makes a `"ladder"` critic: a small transformer that reads the policy's hidden states.
        policy_layers (`int`, *optional*):
            layers of the policy that the critic was made for. A critic that reads several hidden states, from other
            places of a deeper policy, would be wrong.

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
        *,
        reads: int = 1,
        ladder: LadderSizes | None = None,
        policy_layers: int | None = None,
    ):
        super().__init__()
        self.hidden_size = hidden_size
        self.policy_layers = policy_layers
        self.backbone = backbone
        # Not an `nn.Module`: the policy that it refers to is no part of the critic.
        self.adapter = adapter
        # float32 for any dtype of the backbone: values are regression targets, and bf16 has three digits.
        width = hidden_size * reads if ladder is None else ladder.width
        self.head = _Float32Linear(width, 1, dtype=torch.float32)
        # Values start close to 0 (std 0.1 on normalised hidden states) but not at 0, where the head would pass no
        # gradient on to the backbone.
        nn.init.normal_(self.head.weight, std=0.1 / width**0.5)
        nn.init.zeros_(self.head.bias)
        self.output = ValueOutput()
        self.ladder = None if ladder is None else Ladder(hidden_size, ladder)

    @property
    def mode(self) -> str:
        """
        `"separate"`: with a backbone of its own; `"shared"`: on the policy's detached hidden states; `"adapter"`: with
        an adapter of its own on the policy's base model; `"ladder"`: a small transformer on detached hidden states.
        """
        if self.adapter is not None:
            return "adapter"
        if self.ladder is not None:
            return "ladder"
        return "shared" if self.backbone is None else "separate"

    @property
    def reads(self) -> int:
        """Number of the policy's hidden states that the critic reads; 0 with a backbone or an adapter."""
        if self.ladder is not None:
            return self.ladder.sizes.reads
        return self.head.in_features // self.hidden_size if self.mode == "shared" else 0

    def depths(self, policy: PreTrainedModel) -> list[int]:
        """The hidden states that it reads of a policy, or of its backbone: indices of `output_hidden_states=True`."""
        return read_depths(self.reads, num_layers_of(policy))

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
    def from_policy(
        cls,
        policy: PreTrainedModel,
        mode: str = "separate",
        *,
        layers: int | None = None,
        width: int | None = None,
        reads: int | None = None,
    ) -> SegmentValueHead:
        """
        Make a critic for a policy, initialised from it.

        Args:
            policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                causal LM or image-text model. Adapters are merged into the critic's copy; virtual tokens are left out.
            mode (`str`, *optional*, defaults to `"separate"`):
                `"separate"`: copy the policy's backbone, frozen parameters staying frozen (the paper); `"shared"`:
                only a head, on the policy's hidden states; `"adapter"`: a second adapter on the base model of a policy
                with an adapter; `"ladder"`: a small transformer that reads the policy's hidden states.
            layers (`int`, *optional*): `critic_layers` of [`SAPOConfig`].
            width (`int`, *optional*): `critic_width`.
            reads (`int`, *optional*): `critic_reads`.

        Returns:
            [`SegmentValueHead`]
        """
        _check_mode(mode)
        if mode in READING_MODES:
            return cls._reading(mode, policy.config, layers, width, reads)
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
    def _reading(
        cls, mode: str, config: PretrainedConfig, layers: int | None, width: int | None, reads: int | None
    ) -> SegmentValueHead:
        """A new critic that reads hidden states of a policy of this configuration."""
        text = config.get_text_config()
        ladder = None
        if mode == "ladder":
            ladder = LadderSizes.for_policy(text.hidden_size, text.num_hidden_layers, layers, width, reads)
        reads = ladder.reads if ladder is not None else 1 if reads is None else reads
        read_depths(reads, text.num_hidden_layers)  # raises for too many
        return cls(text.hidden_size, reads=reads, ladder=ladder, policy_layers=text.num_hidden_layers)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        mode: str | None = None,
        policy: PreTrainedModel | None = None,
        *,
        layers: int | None = None,
        width: int | None = None,
        reads: int | None = None,
        **kwargs: Any,
    ) -> SegmentValueHead:
        """
        Load a saved critic, or make one from a policy's checkpoint.

        Args:
            path (`str` or `Path`):
                folder or hub id of a critic written by [`SegmentValueHead.save_pretrained`]. It may also be of any
                causal LM, image-text model or backbone; then the head is new.
            mode (`str`, *optional*):
                `"separate"`, `"shared"`, `"adapter"` or `"ladder"`; by default the saved critic's, or `"separate"`. A
                saved critic of another mode is an error.
            policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
                policy that the critic was trained with. A critic of mode `"adapter"` becomes a part of it. A critic
                that reads its hidden states is checked against it.
            layers (`int`, *optional*):
                `critic_layers` of [`SAPOConfig`]. A saved critic with another number is an error.
            width (`int`, *optional*): `critic_width`, in the same way.
            reads (`int`, *optional*): `critic_reads`, in the same way.
            kwargs: passed to [`~transformers.AutoModel.from_pretrained`], e.g. `dtype` or `attn_implementation`.

        Returns:
            [`SegmentValueHead`]
        """
        if mode is not None:
            _check_mode(mode)
        config_file = _resolve(path, HEAD_CONFIG_NAME)
        if config_file is None and mode in READING_MODES:
            known = {name: kwargs[name] for name in ("revision", "trust_remote_code") if name in kwargs}
            return cls._reading(mode, AutoConfig.from_pretrained(path, **known), layers, width, reads)
        if config_file is None:
            backbone = load_backbone(path, **kwargs)
            return cls(hidden_size_of(backbone), backbone)
        config = json.loads(Path(config_file).read_text())
        if mode is not None and mode != config["mode"]:
            raise ValueError(
                f"The critic in {str(path)!r} was saved in mode {config['mode']!r}, not {mode!r}: set "
                f'`critic="{config["mode"]}"`, or start with a new critic.'
            )
        if config["mode"] == "adapter":
            if policy is None:
                raise ValueError(
                    f"The critic in {str(path)!r} is an adapter on its policy's base model: pass the `policy`."
                )
            critic = cls.from_policy(policy, mode="adapter")
            critic.output = ValueOutput.saved(config)
            critic.load_weights(path)
            return critic
        backbone = load_backbone(path, **kwargs) if config["mode"] == "separate" else None
        ladder = None
        if config["mode"] == "ladder":
            ladder = LadderSizes(config["layers"], config["width"], config["reads"])
        critic = cls(
            config["hidden_size"],
            backbone,
            reads=config.get("reads", 1),
            ladder=ladder,
            policy_layers=config.get("policy_layers"),
        )
        critic.check_sizes(f"The critic in {str(path)!r}", layers, width, reads)
        critic.head.load_state_dict(load_file(_resolve(path, HEAD_WEIGHTS_NAME)))
        critic.output = ValueOutput.saved(config)
        if critic.ladder is not None:
            critic.ladder.load_state_dict(load_file(_resolve(path, LADDER_WEIGHTS_NAME)))
        if policy is not None:
            critic.check_reads(policy)
        return critic

    def check_sizes(self, what: str, layers: int | None, width: int | None, reads: int | None) -> None:
        """
        Check a given critic against settings.

        Args:
            what (`str`): the critic's name in the error.
            layers (`int`, *optional*): `critic_layers` of [`SAPOConfig`].
            width (`int`, *optional*): `critic_width`.
            reads (`int`, *optional*): `critic_reads`.

        Raises:
            ValueError: if a setting is not the critic's size.
        """
        own = {"reads": self.reads} if self.ladder is None else asdict(self.ladder.sizes)
        for name, wanted in (("layers", layers), ("width", width), ("reads", reads)):
            if wanted is not None and wanted != own.get(name):
                raise ValueError(
                    f"{what} has `critic_{name}={own.get(name)}`, not {wanted}: set "
                    f"`critic_{name}={own.get(name)}`, or start with a new critic."
                )

    def check_reads(self, policy: PreTrainedModel) -> None:
        """Raise a `ValueError` if the policy has not the hidden states that the critic reads."""
        size = hidden_size_of(backbone_of(policy))
        if self.hidden_size != size:
            raise ValueError(
                f"The critic of mode {self.mode!r} reads hidden states of size {self.hidden_size}, but the policy's "
                f"have size {size}: use a critic that was made for this policy."
            )
        layers = num_layers_of(backbone_of(policy))
        if self.reads > 1 and self.policy_layers not in (None, layers):
            raise ValueError(
                f"The critic of mode {self.mode!r} reads {self.reads} hidden states of a policy of "
                f"{self.policy_layers} layers, but the policy has {layers}: use a critic that was made for this "
                "policy, or start with a new critic."
            )
        if self.reads:
            self.depths(policy)

    def load_weights(self, path: str | Path) -> None:
        """
        Read the weights of a saved critic of the same mode into this one.

        Args:
            path (`str` or `Path`): folder written by [`SegmentValueHead.save_pretrained`].
        """
        self.load_output(path)
        if self.adapter is None:
            own = self.state_dict()
            sizes = {"reads": self.reads} if self.ladder is None else asdict(self.ladder.sizes)
            sizes = sizes if self.reads else {}
            saved = type(self).from_pretrained(path, mode=self.mode, **sizes).state_dict()
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
        config = {"mode": self.mode, "hidden_size": self.hidden_size, **self.output.settings()}
        if self.ladder is not None:
            save_file(_below("ladder.", state), path / LADDER_WEIGHTS_NAME)
            config |= asdict(self.ladder.sizes)
        elif self.reads > 1:
            config["reads"] = self.reads
        if self.reads > 1 and self.policy_layers is not None:
            config["policy_layers"] = self.policy_layers
        (path / HEAD_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")

    def forward(
        self, *, hidden_states: torch.Tensor | Sequence[torch.Tensor] | None = None, **model_inputs: Any
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` or `Sequence[torch.Tensor]`, *optional*):
                float tensor of shape `(B, S, H)` to read instead of running the backbone. A critic that reads the
                policy's hidden states must have them: one for each of [`SegmentValueHead.depths`], in order. No
                gradient reaches them.
            model_inputs: `input_ids`, `attention_mask` and the backbone's other inputs (images).

        Returns:
            `torch.Tensor`: float32 `(B, S)`, the value after each position.
        """
        if self.reads:
            states = [hidden_states] if isinstance(hidden_states, torch.Tensor) else list(hidden_states or ())
            if len(states) != self.reads:
                raise ValueError(
                    f"A {self.mode!r} critic has no backbone: pass {self.reads} of the policy's `hidden_states`, got "
                    f"{len(states)}."
                )
            taken = [self.take(index, state.detach()) for index, state in enumerate(states)]
            return self.values_of(taken, model_inputs.get("attention_mask"))
        if hidden_states is None:
            with self.active():
                if self.adapter is not None:
                    hidden_states = self.adapter.hidden_states(**model_inputs, use_cache=False)
                else:
                    hidden_states = self.backbone(**model_inputs, use_cache=False).last_hidden_state
        # Clone: FSDP2 cannot hook into the backward of a view that is changed in place.
        return self.output(self.head(hidden_states).squeeze(-1).clone())

    def take(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Reduce one of the policy's hidden states to the part that its value needs, so that the state is not kept.

        Args:
            index (`int`): place of the state in [`SegmentValueHead.depths`].
            hidden_states (`torch.Tensor`): detached, float `(B, S, H)`.

        Returns:
            `torch.Tensor`: for [`SegmentValueHead.values_of`].
        """
        if self.ladder is not None:
            return self.ladder.take(index, hidden_states)
        if self.reads == 1:
            return self.head(hidden_states)
        return self.head.share(normalised(hidden_states), index * self.hidden_size)

    def values_of(self, taken: Sequence[torch.Tensor], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Values from all that was taken of the policy's hidden states.

        Args:
            taken (`Sequence[torch.Tensor]`): of [`SegmentValueHead.take`], in order.
            attention_mask (`torch.Tensor`, *optional*):
                `(B, S)`, not 0 on tokens. A ladder attends to these; by default to all.

        Returns:
            `torch.Tensor`: float32 `(B, S)`, the value after each position.
        """
        if self.ladder is not None:
            if attention_mask is None:
                attention_mask = torch.ones(taken[0].shape[:2], device=taken[0].device)
            values = self.head(self.ladder(taken, attention_mask))
        elif self.reads == 1:
            values = taken[0]
        else:
            values = torch.stack(list(taken)).sum(0) + self.head.bias
        return self.output(values.squeeze(-1))


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
