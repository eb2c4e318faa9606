"""Writes the policy's weights to a folder for a sampler, without the critic and with merged adapters."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from ..distributed import weights_are_in_pieces


INCOMPLETE_FOLDER = "incomplete-policy"
_COMPLETE_FOLDER = re.compile(r"policy-step-\d+-[0-9a-f]{8}")


def save_policy(trainer: Any, weights_dir: Path, name: str) -> None:
    """
    Write the policy's weights to `weights_dir / name`. The folder appears only when it is complete.

    All processes must call this function, because sharded weights are gathered. The main process writes. The critic is
    never written: a separate or shared critic is not part of the policy's module, and an adapter critic is left out.

    Args:
        trainer ([`~trl.GRPOTrainer`]): the trainer. Its model is written in its training dtype.
        weights_dir (`Path`): the parent folder. It is created if necessary.
        name (`str`): `policy-step-<step>-<eight hexadecimal digits>`.

    Raises:
        `ValueError`: if adapters cannot be merged. This holds for a quantized or sharded base model, and for adapters
            that are not a difference of weights.
    """
    accelerator = trainer.accelerator
    policy = accelerator.unwrap_model(trainer.model)
    if isinstance(policy, PeftModel):
        _check_mergeable(policy, accelerator)
        if accelerator.is_main_process:
            with _merged(policy) as state:
                _write(policy.get_base_model(), state, weights_dir, name)
        return
    # `model_wrapped` is the prepared model. DeepSpeed's engine, for example, gathers its sharded weights.
    state = accelerator.get_state_dict(trainer.model_wrapped)
    if accelerator.is_main_process:
        _write(policy, state, weights_dir, name)


def version_of_policy(trainer: Any) -> tuple:
    """
    A value that changes with the policy's weights during one call of `train`, and afterwards.

    The step alone does not tell: the best checkpoint may be loaded after the last step, and a schedule-free optimizer
    has other weights for evaluation. PyTorch's count of changes alone does not tell either: fused optimizers do not
    count their steps.

    Args:
        trainer ([`~trl.GRPOTrainer`]): the trainer.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    changes = tuple((id(p), 0 if p.is_inference() else p._version) for p in policy.parameters())
    return trainer.state.global_step, changes


def remove_others(weights_dir: Path, name: str) -> None:
    """Remove the weights of earlier steps and of earlier runs."""
    for folder in weights_dir.iterdir():
        if folder.name != name and _COMPLETE_FOLDER.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _write(model: Any, state: dict[str, torch.Tensor], weights_dir: Path, name: str) -> None:
    staging = weights_dir / INCOMPLETE_FOLDER
    shutil.rmtree(staging, ignore_errors=True)  # left by a process that died
    staging.mkdir(parents=True)
    # Save like a checkpoint. In checkpoints the weights of some architectures have other names than in memory, and
    # samplers expect the names of checkpoints.
    model.save_pretrained(staging, state_dict=state)
    os.rename(staging, weights_dir / name)


def _check_mergeable(policy: PeftModel, accelerator: Any) -> None:
    base = policy.get_base_model()
    if getattr(base, "is_quantized", False) or getattr(base, "hf_quantizer", None) is not None:
        raise ValueError(
            "An adapter cannot be merged into a quantized base model without changing it. Train the adapter on a "
            "base model in a floating-point dtype, or generate without a vLLM server."
        )
    if weights_are_in_pieces(accelerator):
        raise ValueError(
            "An adapter cannot be merged into a base model that is sharded over processes (ZeRO-3, FSDP). Use ZeRO-2 "
            "or plain data parallelism with adapters and a vLLM server."
        )
    if not hasattr(policy.base_model, "merge_adapter"):
        raise ValueError(
            f"Adapters of type {policy.peft_config[policy.active_adapter].peft_type} cannot be merged into the base "
            "model; a vLLM server can only be sent merged weights."
        )


@contextlib.contextmanager
def _merged(policy: PeftModel) -> Iterator[dict[str, torch.Tensor]]:
    """
    The base model's state with the policy's adapter merged in, under the base model's names.

    Afterwards the base model's weights are restored from copies, bit for bit. Subtracting the adapter again would
    leave rounding errors, which would add up in the frozen weights over a run of many steps.
    """
    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    before = [
        (parameter, parameter.detach().to("cpu", copy=True))
        for layer in layers
        for parameter in layer.get_base_layer().parameters(recurse=False)
    ]
    # Merge only active adapters: the critic may have an adapter, too.
    policy.base_model.merge_adapter(adapter_names=list(policy.active_adapters))
    try:
        yield _base_state(policy)
    finally:
        policy.base_model.unmerge_adapter()
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


def _base_state(policy: PeftModel) -> dict[str, torch.Tensor]:
    saved_modules = re.compile(r"\.modules_to_save\.([^.]+)(?=\.)")
    state = {}
    for name, tensor in policy.state_dict().items():
        match = saved_modules.search(name)
        if policy.base_model.prefix in name or ".original_module." in name:
            continue
        if match and match[1] not in policy.active_adapters:
            continue
        name = saved_modules.sub("", name).removeprefix("base_model.model.").replace(".base_layer.", ".")
        state[name] = tensor
    return state
