"""The inputs of a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl import ModelConfig

    from ..config import SAPOConfig


SHARDINGS = ("none", "zero2", "zero3", "fsdp2")
GIB = 1024**3

# A published checkpoint, which `dtype="auto"` follows, is in half precision.
_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2, None: 4}

_OPTIMIZER_STATES = {
    "adamw_torch": 2.0,
    "adamw_torch_fused": 2.0,
    # One byte a number instead of the parameter's four.
    "adamw_8bit": 0.5,
    "adamw_bnb_8bit": 0.5,
    "paged_adamw_8bit": 0.5,
    "sgd": 0.0,
}


@dataclass(frozen=True)
class Lora:
    """
    LoRA adapters, as in [`~trl.ModelConfig`].

    Args:
        rank (`int`): `lora_r`.
        targets (`tuple[str]` or `str`, *optional*): `lora_target_modules`; `None` for PEFT's choice.
    """

    rank: int = 16
    targets: tuple[str, ...] | str | None = None


@dataclass(frozen=True)
class Setup:
    """
    A model, an algorithm's settings that cost memory, and the machine.

    Args:
        model (`str`): known model or folder, see [`~sapo_trl.planner.shapes.model_config`].
        processes (`int`): GPUs of the whole run.
        sharding (`str`): `"none"` (one GPU or DDP), `"zero2"`, `"zero3"` or `"fsdp2"`.
        gpu_memory_gib (`float`): memory of each GPU, in GiB.
        micro_batch (`int`): `per_device_train_batch_size`.
        accumulation (`int`): `gradient_accumulation_steps`.
        mini_batches (`int`): optimizer steps per rollout.
        prompt_length (`int`): tokens of a prompt, image tokens included.
        image_tokens (`int`): image tokens among them.
        completion_length (`int`): `max_completion_length`.
        gradient_checkpointing (`bool`): as in [`SAPOConfig`].
        critic (`str`): as in [`SAPOConfig`].
        critic_layers (`int`, *optional*): as in [`SAPOConfig`].
        critic_width (`int`, *optional*): as in [`SAPOConfig`].
        critic_reads (`int`, *optional*): as in [`SAPOConfig`].
        compares_images (`bool`): whether the policy also sees corrupted images, as in [`SAPOConfig`].
        compares_with_gradient (`bool`): whether it learns from them, too (`perception_kl_gradient`).
        beta (`float`): as in [`SAPOConfig`]; not 0 keeps a reference model, unless there is an adapter.
        weight_bytes (`int`): bytes of a loaded number.
        mixed_precision (`bool`): whether the forward runs in half precision.
        optimizer_states (`float`): numbers that the optimizer keeps for each parameter, in units of the parameter.
        lora ([`Lora`], *optional*): adapters; `None` trains all weights.
        quantized_bits (`int`, *optional*): 4 or 8, for a quantized frozen base model.
        vllm (`str`, *optional*): `"colocate"`, `"server"`, or `None` for generation with transformers.
        vllm_share (`float`): `vllm_gpu_memory_utilization`.
        vllm_ranks (`int`): `vllm_tensor_parallel_size`.
        vllm_length (`int`, *optional*): `vllm_max_model_length`.
        vllm_sleeps (`bool`): `vllm_enable_sleep_mode`.

    Raises:
        ValueError: for values that no run could have.
    """

    model: str
    processes: int = 1
    sharding: str = "none"
    gpu_memory_gib: float = 80.0
    micro_batch: int = 1
    accumulation: int = 1
    mini_batches: int = 4
    prompt_length: int = 1024
    image_tokens: int = 512
    completion_length: int = 2048
    gradient_checkpointing: bool = True
    critic: str = "separate"
    critic_layers: int | None = None
    critic_width: int | None = None
    critic_reads: int | None = None
    compares_images: bool = False
    compares_with_gradient: bool = False
    beta: float = 0.001
    weight_bytes: int = 4
    mixed_precision: bool = True
    optimizer_states: float = 2.0
    lora: Lora | None = None
    quantized_bits: int | None = None
    vllm: str | None = None
    vllm_share: float = 0.3
    vllm_ranks: int = 1
    vllm_length: int | None = None
    vllm_sleeps: bool = False

    def __post_init__(self):
        if self.sharding not in SHARDINGS:
            raise ValueError(f"`sharding` must be one of {SHARDINGS}, got {self.sharding!r}.")
        for name in ("processes", "gpu_memory_gib", "micro_batch", "accumulation", "mini_batches", "prompt_length"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not 0 <= self.image_tokens <= self.prompt_length:
            raise ValueError(f"`image_tokens` must lie in [0, {self.prompt_length}], got {self.image_tokens}.")
        if self.vllm_ranks > self.processes:
            raise ValueError(
                f"`vllm_tensor_parallel_size` is {self.vllm_ranks}, but there are {self.processes} processes."
            )

    @classmethod
    def from_args(cls, args: SAPOConfig, model_args: ModelConfig, **machine: Any) -> Setup:
        """
        The setup of a run.

        Args:
            args ([`SAPOConfig`]): settings of the run.
            model_args ([`~trl.ModelConfig`]): model of the run.
            machine: the remaining fields: `processes`, `sharding`, `gpu_memory_gib`, `prompt_length`, `image_tokens`.

        Raises:
            ValueError: for an optimizer whose memory is not known.
        """
        optimizer = getattr(args.optim, "value", args.optim)
        if optimizer not in _OPTIMIZER_STATES:
            raise ValueError(f"The memory of optim={optimizer!r} is not known; known: {', '.join(_OPTIMIZER_STATES)}.")
        targets = model_args.lora_target_modules
        quantized_bits = 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None
        return cls(
            model=model_args.model_name_or_path,
            micro_batch=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            mini_batches=args.num_mini_batches,
            completion_length=args.max_completion_length,
            gradient_checkpointing=args.gradient_checkpointing,
            critic=args.critic,
            critic_layers=args.critic_layers,
            critic_width=args.critic_width,
            critic_reads=args.critic_reads,
            compares_images=args.compares_images,
            compares_with_gradient=args.perception_kl_gradient,
            beta=args.beta,
            weight_bytes=_WEIGHT_BYTES[model_args.dtype],
            mixed_precision=bool(args.bf16 or args.fp16),
            optimizer_states=_OPTIMIZER_STATES[optimizer],
            lora=Lora(model_args.lora_r, tuple(targets) if isinstance(targets, list) else targets)
            if model_args.use_peft
            else None,
            quantized_bits=quantized_bits if model_args.use_peft else None,
            vllm=args.vllm_mode if args.use_vllm else None,
            vllm_share=args.vllm_gpu_memory_utilization,
            vllm_ranks=args.vllm_tensor_parallel_size,
            vllm_length=args.vllm_max_model_length,
            vllm_sleeps=args.vllm_enable_sleep_mode,
            **machine,
        )

    def changed(self, **changes: Any) -> Setup:
        """A copy with other values."""
        return replace(self, **changes)

    @property
    def sequence_length(self) -> int:
        """Tokens of a prompt with its longest response."""
        return self.prompt_length + self.completion_length

    @property
    def rollout_rows(self) -> int:
        """Responses that one process generates per rollout."""
        return self.micro_batch * self.accumulation * self.mini_batches
