"""The critic's side of training: its optimizer, schedule, gradient clipping and checkpoint."""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast, fsdp2_prepare_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.integrations import is_deepspeed_zero3_enabled

from ..config import SAPOConfig
from ..distributed import clip_grad_norm, gathered_state, sharded_like
from ..resumed_settings import Settings, optimizer_settings, restore_settings
from .value_head import READING_MODES, SegmentValueHead


logger = logging.getLogger(__name__)

CRITIC_FOLDER = "critic"
CRITIC_OPTIMIZER_NAME = "critic_optimizer.pt"

_SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
)


class Critic:
    """
    A value model that is trained beside the policy.

    Its gradients, learning rate and clipping never mix with the policy's, and it is no submodule of the policy, so
    that neither the policy's checkpoint nor a weight sync to the sampler can contain it.

    Args:
        value_head ([`SegmentValueHead`]): the model.
        args ([`SAPOConfig`]): settings.
        accelerator ([`~accelerate.Accelerator`]): of the trainer.
        decay_parameter_names (`list[str]`): names of the parameters that weight decay applies to.
    """

    def __init__(
        self,
        value_head: SegmentValueHead,
        args: SAPOConfig,
        accelerator: Accelerator,
        decay_parameter_names: list[str],
    ):
        if accelerator.distributed_type not in _SUPPORTED:
            # It would go on without a word, each process with a critic of its own.
            raise ValueError(
                f"A critic cannot be trained under {accelerator.distributed_type} yet: launch with DDP "
                '(`accelerate launch --multi_gpu`), DeepSpeed or FSDP2, or set `critic="none"`.'
            )
        uses_fsdp = accelerator.distributed_type == DistributedType.FSDP
        if uses_fsdp and not accelerator.is_fsdp2:
            raise ValueError(
                "A critic cannot be trained under FSDP1, which PyTorch is giving up: set `fsdp_version: 2` in the "
                'accelerate config, or `critic="none"`.'
            )
        if uses_fsdp and accelerator.mixed_precision == "fp16" and value_head.mode not in READING_MODES:
            raise ValueError(
                "A critic cannot be trained under FSDP2 in fp16, whose gradient scaler would skip steps on some "
                'processes only: set `mixed_precision: bf16` in the accelerate config, or `critic="shared"`.'
            )
        self.args = args
        self.accelerator = accelerator
        # An adapter's parameters are none of the module's. A head or a ladder is little to shard, and runs within the
        # policy's forward, where DDP would synchronise its gradient in every micro-batch. Theirs are averaged by hand.
        uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self._is_wrapped = value_head.mode == "separate"
        if value_head.mode == "adapter" and uses_deepspeed and is_deepspeed_zero3_enabled():
            raise ValueError(
                '`critic="adapter"` cannot be trained with ZeRO-3, which cuts the adapter to pieces together with the '
                "policy: use ZeRO-2 or DDP (the base model is in memory once), or another critic."
            )
        self.module: nn.Module = self._prepared(value_head)
        self.scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self._settings: Settings = []

        optimizer_class, optimizer_kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer_kwargs["lr"] = args.critic_learning_rate
        weight_decay = args.weight_decay if args.critic_weight_decay is None else args.critic_weight_decay
        own = {id(parameter) for parameter in value_head.parameters()}
        # An adapter's parameters are in groups of their own: FSDP2 will put pieces in their places, and an optimizer's
        # fused step takes no group of pieces and whole tensors.
        groups: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in value_head.learned_parameters():
            groups[id(parameter) in own, name in decay_parameter_names].append((name, parameter))
        if not groups:
            raise ValueError('The critic has no trainable parameter: unfreeze its head, or set `critic="none"`.')
        dtypes = {parameter.dtype for _, parameter in value_head.learned_parameters()}
        dtype = next((dtype for dtype in dtypes if dtype in (torch.bfloat16, torch.float16)), None)
        if dtype is not None:
            logger.warning(
                "The critic's weights are %s, which rounds most updates at `critic_learning_rate=%g` away. Load the "
                "model in float32 and let `bf16=True` run it in half precision.",
                dtype,
                args.critic_learning_rate,
            )
        self._names = [[name for name, _ in group] for group in groups.values()]
        self.optimizer = optimizer_class(
            [
                {"params": [parameter for _, parameter in group], "weight_decay": weight_decay if is_decayed else 0.0}
                for (_, is_decayed), group in groups.items()
            ],
            **optimizer_kwargs,
        )
        # The policy's scaler belongs to the policy's optimizer; under fp16 the critic needs one of its own.
        self.scaler = torch.amp.GradScaler(
            accelerator.device.type, enabled=accelerator.mixed_precision == "fp16" and accelerator.device.type != "cpu"
        )

    def _prepared(self, value_head: SegmentValueHead) -> nn.Module:
        if not self._is_wrapped:
            value_head = value_head.to(self.accelerator.device)
            if self.accelerator.num_processes > 1:
                # As DDP does: each process may have initialised the user's critic with its own random numbers.
                broadcast([parameter.data for parameter in value_head.parameters()])
            return value_head
        if self.accelerator.is_fsdp2:
            with _own_layers_to_wrap(self.accelerator, value_head):
                return fsdp2_prepare_model(self.accelerator, value_head)
        return self.accelerator.prepare_model(value_head)

    def _follow_parameters(self) -> None:
        """Let the optimizer train an adapter's new parameters after FSDP2 has sharded the policy."""
        current = dict(self.value_head.learned_parameters())
        for group, names in zip(self.optimizer.param_groups, self._names, strict=True):
            group["params"] = [current[name] for name in names]

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def value_head(self) -> SegmentValueHead:
        """The model, unwrapped."""
        return self.accelerator.unwrap_model(self.module)

    def at(self, mode: str) -> nn.Module:
        """
        The model at the weights of a mode, `"train"` or `"eval"`: schedule-free optimizers have weights for each.

        The mode is the policy's, whose optimizer transformers switches together with the policy.
        """
        switch = getattr(self.optimizer, mode, None)
        if callable(switch):
            switch()
        return self.module

    @property
    def learning_rate(self) -> float:
        """Current learning rate."""
        return self.optimizer.param_groups[0]["lr"]

    def create_scheduler(self, num_training_steps: int) -> None:
        """Make the learning rate schedule, once the length of training is known; anew for every call of `train`."""
        args = self.args
        self._follow_parameters()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = args.critic_learning_rate
        kind = SchedulerType(args.critic_lr_scheduler_type or args.lr_scheduler_type)
        # These arguments belong to the policy's schedule: a schedule of another kind does not take them.
        kwargs = args.lr_scheduler_kwargs if kind == args.lr_scheduler_type else None
        if kind == SchedulerType.CONSTANT and args.critic_lr_warmup_steps > 0:
            kind = SchedulerType.CONSTANT_WITH_WARMUP  # "constant" would ignore the warm-up
        self.scheduler = get_scheduler(
            kind,
            optimizer=self.optimizer,
            num_warmup_steps=args.critic_lr_warmup_steps,
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=kwargs,
        )
        self._settings = optimizer_settings(self.optimizer)

    def start_at(self, rewards: torch.Tensor) -> bool:
        """
        Let a new critic's values start at a mean reward, if the run asks for it.

        Args:
            rewards (`torch.Tensor`): `(N,)`, of the first rollout on all processes; NaN for a missing one.

        Returns:
            `bool`: whether the values have changed.
        """
        output = self.value_head.output
        if self.args.critic_initial_value != "reward_mean" or output.is_set or rewards.isnan().all():
            return False
        output.start_at(rewards.double().nanmean().item())
        return True

    @contextlib.contextmanager
    def accumulate(self, is_last: bool | None = None) -> Iterator[None]:
        """
        Context of one micro-batch's forward and backward: gradients are synchronised on the last one only.

        Args:
            is_last (`bool`, *optional*): whether this is an update's last micro-batch; by default the policy's is.
        """
        is_last = self.accelerator.sync_gradients if is_last is None else is_last
        with self.value_head.active(), contextlib.ExitStack() as stack:
            if self._is_wrapped and not is_last:
                stack.enter_context(self.accelerator.no_sync(self.module))
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradient."""
        self.scaler.scale(loss).backward()

    def clip_gradient(self) -> torch.Tensor:
        """
        Clip the sum of the micro-batches' gradients.

        Returns:
            `torch.Tensor`: 0-dimensional, the norm before clipping.
        """
        if not self._is_wrapped and self.accelerator.num_processes > 1:
            self._average_gradients()  # first: an overflow on one process must reach all
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm(self._parameters, self.args.critic_max_grad_norm)
        return norm.to(self.accelerator.device)

    def step(self, skip: bool = False, advance: bool = True) -> None:
        """
        Update the critic and advance the schedule.

        Args:
            skip (`bool`, *optional*, defaults to `False`): whether to drop the gradient instead of applying it.
            advance (`bool`, *optional*, defaults to `True`): whether to advance the schedule.
        """
        if not skip:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if advance and self.scheduler is not None:
            self.scheduler.step()

    def _average_gradients(self) -> None:
        """
        Replace every gradient by its mean over processes, in one reduction for each dtype.

        A process's rows decide which parameters have a gradient: a vision tower has gradients only if there is an
        image. A gradient that is missing on one process counts as zeros. A gradient that is missing on all processes
        stays missing, because an optimizer would take zeros for a gradient and decay the weight.
        """
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
        for parameter in self._parameters:
            if not isinstance(parameter, DTensor):  # FSDP2 has averaged an adapter's gradients
                by_dtype[parameter.dtype].append(parameter)
        for parameters in by_dtype.values():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            # Behind the gradients, one number for each parameter says whether it has a gradient.
            exists = gradients[0].new_tensor([float(p.grad is not None) for p in parameters])
            mean = self.accelerator.reduce(torch.cat([*map(torch.flatten, gradients), exists]), reduction="mean")
            *gradients, exists = mean.split([*map(torch.numel, parameters), len(parameters)])
            for parameter, gradient, share in zip(parameters, gradients, exists.tolist(), strict=True):
                parameter.grad = gradient.view_as(parameter) if share > 0 else None

    def save_weights(self, folder: str | Path) -> None:
        """Write the model, for [`SegmentValueHead.from_pretrained`]; called on all processes."""
        self.value_head.save_pretrained(folder, is_main_process=self.args.should_save)

    def save_optimizer(self, folder: str | Path) -> None:
        """Write everything but the weights, for [`Critic.load`]; called on all processes."""
        state = {
            "optimizer": self._whole_optimizer_state(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "scaler": self.scaler.state_dict(),
        }
        if self.args.should_save:
            torch.save(state, Path(folder) / CRITIC_OPTIMIZER_NAME)

    def _whole_optimizer_state(self) -> dict[str, Any] | None:
        return gathered_state(self.optimizer.state_dict(), keep=self.args.should_save)

    def load_weights(self, checkpoint: str | Path) -> None:
        """
        Restore the weights from a checkpoint of the trainer.

        Args:
            checkpoint (`str` or `Path`): folder of the checkpoint.

        Raises:
            FileNotFoundError: if the checkpoint holds no critic.
        """
        self.value_head.load_weights(self.check_folder(checkpoint))

    def check_folder(self, checkpoint: str | Path) -> Path:
        """The folder of a checkpoint's critic. Raises `FileNotFoundError` if there is none."""
        folder = Path(checkpoint) / CRITIC_FOLDER
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{str(checkpoint)!r} holds no critic (no folder {CRITIC_FOLDER!r}): it was written by a run with "
                '`critic="none"` or by another trainer. Pass it as the model instead of resuming from it.'
            )
        return folder

    def load(self, checkpoint: str | Path) -> bool:
        """
        Restore weights, optimizer and schedule, see [`Critic.load_weights`].

        Returns:
            `bool`: whether the checkpoint holds the state of the optimizer, which one of `save_only_model=True` does
            not.
        """
        self.load_weights(checkpoint)
        state_file = Path(checkpoint) / CRITIC_OPTIMIZER_NAME
        if not state_file.is_file():
            return False
        # Memory-mapped: each process reads the whole state one tensor at a time and keeps only its shards.
        state = torch.load(state_file, map_location="cpu", weights_only=True, mmap=True)
        self.optimizer.load_state_dict(self._in_pieces(state["optimizer"]))
        self._load_schedule(state)
        self.scaler.load_state_dict(state["scaler"])
        return True

    def _load_schedule(self, state: dict[str, Any]) -> None:
        """Restore the schedule, then apply the run's settings to the optimizer."""
        if self.scheduler is None:  # loaded outside of training
            return
        if state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        restore_settings("critic", self.optimizer, self.scheduler, self._settings)

    def _in_pieces(self, state: dict[str, Any]) -> dict[str, Any]:
        """Shard the state of the whole optimizer for this process."""
        parameters = self._parameters
        for index, of_parameter in state["state"].items():  # in any order; some parameters have no state
            parameter = parameters[index]
            for name, value in of_parameter.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    of_parameter[name] = sharded_like(value, parameter)
        return state


@contextlib.contextmanager
def _own_layers_to_wrap(accelerator: Accelerator, value_head: SegmentValueHead) -> Iterator[None]:
    """
    Let FSDP2 wrap the layers of the critic's backbone.

    accelerate looks once for the layers to wrap, in the first model that it is given. A critic is no transformers
    model: accelerate would find no layers in it, and then would wrap no layers of the policy either.
    """
    plugin = accelerator.state.fsdp_plugin
    policy, layers = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    if layers is None:
        plugin.transformer_cls_names_to_wrap = sorted(value_head.backbone._no_split_modules or [])
    try:
        yield
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy, layers
