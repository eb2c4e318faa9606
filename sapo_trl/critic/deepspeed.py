"""A separate critic under DeepSpeed. It has its own engine, sharded like the policy's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from .training import CRITIC_FOLDER, CRITIC_OPTIMIZER_NAME, Critic
from .value_head import SegmentValueHead


ENGINE_FOLDER = "critic_engine"
_TAG = "critic"


class DeepSpeedCritic(Critic):
    """
    [`Critic`] whose gradients and optimizer state (and, with ZeRO-3, weights) DeepSpeed shards over processes.

    Takes the arguments of [`Critic`]. DeepSpeed clips within its update, so both happen in
    [`DeepSpeedCritic.clip_gradient`].
    """

    def __init__(self, value_head: SegmentValueHead, *args, **kwargs):
        super().__init__(value_head, *args, **kwargs)
        import deepspeed  # imported late: the import takes over parts of torch

        config = copy.deepcopy(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        for name in ("optimizer", "scheduler", "train_batch_size"):
            config.pop(name, None)
        config |= {
            "train_micro_batch_size_per_gpu": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "gradient_clipping": self.args.critic_max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.engine, *_ = deepspeed.initialize(model=value_head, optimizer=self.optimizer, config=config)
        self.module = self.engine

    @property
    def stage(self) -> int:
        """The stage of ZeRO, 0 to 3."""
        return self.engine.zero_optimization_stage()

    def _prepared(self, value_head: SegmentValueHead) -> nn.Module:
        return value_head.to(self.accelerator.device)

    def _follow_parameters(self) -> None:
        """Nothing: the optimizer's parameters are DeepSpeed's flat tensors by now."""

    @contextlib.contextmanager
    def accumulate(self, is_last: bool | None = None) -> Iterator[None]:
        is_last = self.accelerator.sync_gradients if is_last is None else is_last
        self.engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        # The loss is a share of the optimizer step's already.
        self.engine.backward(loss, scale_wrt_gas=False)

    def clip_gradient(self) -> torch.Tensor:
        """Clip the gradient and update the critic. Returns the norm before, a 0-dimensional tensor."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(0.0 if norm is None else norm, device=self.accelerator.device).float()

    def step(self, skip: bool = False, advance: bool = True) -> None:
        if advance and self.scheduler is not None:
            self.scheduler.step()

    def save_weights(self, folder: str | Path) -> None:
        with self._whole():
            super().save_weights(folder)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Context in which every process has every parameter."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.value_head.parameters()), modifier_rank=0):
            yield

    def _whole_optimizer_state(self) -> None:
        """In the engine's own checkpoint."""

    def save_optimizer(self, folder: str | Path) -> None:
        super().save_optimizer(folder)
        self.engine.save_checkpoint(str(Path(folder) / ENGINE_FOLDER), tag=_TAG)

    def load(self, checkpoint: str | Path) -> bool:
        self.check_folder(checkpoint)
        folder, state_file = Path(checkpoint) / ENGINE_FOLDER, Path(checkpoint) / CRITIC_OPTIMIZER_NAME
        if not folder.is_dir() or not state_file.is_file():
            self.load_weights(checkpoint)
            return False
        self.engine.load_checkpoint(str(folder), tag=_TAG)
        self.value_head.load_output(Path(checkpoint) / CRITIC_FOLDER)
        self._load_schedule(torch.load(state_file, map_location="cpu", weights_only=True))
        return True

    def load_weights(self, checkpoint: str | Path) -> None:
        self.check_folder(checkpoint)
        self.value_head.load_output(Path(checkpoint) / CRITIC_FOLDER)
        saved = SegmentValueHead.from_pretrained(Path(checkpoint) / CRITIC_FOLDER, mode=self.value_head.mode)
        with self._whole():
            if self.stage < 3 or self.accelerator.is_main_process:
                self.value_head.load_state_dict(saved.state_dict())
