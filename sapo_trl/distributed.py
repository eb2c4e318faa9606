"""Several processes: numbers and tensors of all of them, and weights that are kept in pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Processes:
    """
    The processes of a run. Every method but the properties is to be called on all of them.

    Args:
        accelerator ([`~accelerate.Accelerator`]): of the run.
    """

    accelerator: Accelerator

    @property
    def count(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def index(self) -> int:
        """Number of this process, from 0."""
        return self.accelerator.process_index

    def wait(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over processes."""
        return self.accelerator.reduce(tensor, reduction="sum")

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise mean over processes."""
        return self.accelerator.reduce(tensor, reduction="mean")

    def max(self, number: int) -> int:
        """Largest value of a number."""
        if self.count == 1:
            return number
        return int(self.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, as many of each, in the order of the processes."""
        return self.accelerator.gather(tensor)

    def gather_padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows `(B, T)` of all processes, as [`Processes.gather`], where `T` may differ; filled up with 0."""
        return self.gather(self.accelerator.pad_across_processes(tensor, dim=1))

    def gather_objects(self, objects: list[Any]) -> list[Any]:
        """The objects of all processes in one list."""
        return gather_object(objects) if self.count > 1 else objects

    def own_rows(self, gathered: torch.Tensor, rows: int) -> torch.Tensor:
        """This process's rows of a gathered tensor."""
        return gathered[self.index * rows : (self.index + 1) * rows]


def weights_are_in_pieces(accelerator: Accelerator) -> bool:
    """Whether a model's forward has all processes put its layers together, one after the other (ZeRO-3, FSDP)."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def gradients_are_in_pieces(accelerator: Accelerator) -> bool:
    """Whether each micro-batch's backward has all processes add up their gradients (ZeRO-2, ZeRO-3, FSDP)."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage >= 2
    return accelerator.distributed_type == DistributedType.FSDP


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor; itself if it is in one piece. Of all processes if it is not."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_state(state: Any, keep: bool) -> Any:
    """
    The whole of every tensor in nested dictionaries and lists, on the CPU.

    Args:
        state (`Any`): for example of an optimizer.
        keep (`bool`): whether this process wants them; a process that does not gets `None` in their places, so that
            they are in memory once.
    """

    def whole(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = gathered(value.detach())
        return value.cpu() if keep else None

    return tree_map(whole, state)


def sharded_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor in the pieces that `like` is in; itself if that is in one. Of all processes if it is not."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def total_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """
    Norm of some tensors taken together, sharded or whole.

    Returns:
        `torch.Tensor`: 0-dimensional, the same on all processes as far as the tensors are.
    """
    # Apart, because torch computes nothing on both kinds together.
    in_pieces, in_one = [], []
    for tensor in tensors:
        (in_pieces if isinstance(tensor, DTensor) else in_one).append(tensor)
    norms = [gathered(torch.nn.utils.get_total_norm(kind)) for kind in (in_pieces, in_one) if kind]
    if not norms:
        return torch.zeros(())
    if len(norms) == 1:
        return norms[0]
    # With CPU offload the sharded tensors are elsewhere.
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[-1].device) for norm in norms]))


def gradient_norm(model: nn.Module, accelerator: Accelerator) -> torch.Tensor:
    """
    Norm of a model's gradients.

    Returns:
        `torch.Tensor`: 0-dimensional, of the gradients that this process holds; under DeepSpeed of all gradients at
        its last step, or 0.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        norm = accelerator.deepspeed_engine_wrapped.get_global_grad_norm()
        return torch.as_tensor(0.0 if norm is None else norm, device=accelerator.device).float()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return total_norm(gradients).to(accelerator.device)


def clip_grad_norm(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """[`torch.nn.utils.clip_grad_norm_`] for parameters, sharded or whole. Returns the norm before."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = total_norm(parameter.grad for parameter in parameters)
    for in_pieces in (True, False):
        kind = [parameter for parameter in parameters if isinstance(parameter, DTensor) == in_pieces]
        torch.nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return norm


@contextlib.contextmanager
def whole_lm_head(model: Callable) -> Iterator[None]:
    """
    Under FSDP2: put the LM head together before a forward, as FSDP2 does with modules that are called.

    TRL's fused head is not called, its weight is read. TRL gathers the weight in a way whose gradient is not added up
    over the processes: each would train its rows of the weight on its own responses alone.
    """
    head = model.get_output_embeddings() if isinstance(model, FSDPModule) else None
    if not isinstance(head, FSDPModule):  # a reference, which is one piece; no FSDP2; a critic
        yield
        return
    head.unshard()
    try:
        yield
    except BaseException:
        head.reshard()
        raise
    if not torch.is_grad_enabled():
        head.reshard()  # else the backward needs it, and puts it away


def keep_output_dtype(accelerator: Accelerator) -> None:
    """
    Let FSDP2 leave the dtype of modules' outputs alone.

    accelerate would have them in half precision: log-probabilities in steps of 1/64, and values.
    """
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.mixed_precision_policy is not None:
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
