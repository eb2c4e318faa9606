"""The smallest changes that make a run fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .memory import MemoryPlan, plan_memory
from .setup import Lora, Setup


@dataclass(frozen=True)
class Suggestion:
    """
    Changes that make a setup fit.

    Args:
        changes (`tuple[str, ...]`): the settings to change, in words.
        setup ([`Setup`]): the setup with these changes.
    """

    changes: tuple[str, ...]
    setup: Setup


Change = Callable[[Setup], tuple[str, Setup] | None]


def _smaller_micro_batch(setup: Setup) -> tuple[str, Setup] | None:
    if setup.micro_batch == 1:
        return None
    rows = setup.micro_batch * setup.accumulation  # the optimizer step keeps its size
    changed = setup.changed(micro_batch=1, accumulation=rows)
    for size in range(setup.micro_batch - 1, 1, -1):  # no smaller than necessary
        candidate = setup.changed(micro_batch=size, accumulation=rows // size)
        if rows % size == 0 and plan_memory(candidate).fits:
            changed = candidate
            break
    text = (
        f"per_device_train_batch_size {setup.micro_batch} → {changed.micro_batch}, gradient_accumulation_steps "
        f"{setup.accumulation} → {changed.accumulation}"
    )
    return text, changed


def _checkpointing(setup: Setup) -> tuple[str, Setup] | None:
    if setup.gradient_checkpointing:
        return None
    return "gradient_checkpointing: true", setup.changed(gradient_checkpointing=True)


def _sleep(setup: Setup) -> tuple[str, Setup] | None:
    if setup.vllm != "colocate" or setup.vllm_sleeps:
        return None
    return "vllm_enable_sleep_mode: true", setup.changed(vllm_sleeps=True)


def _vllm_share(setup: Setup) -> tuple[str, Setup] | None:
    """The smallest share in which vLLM starts."""
    if setup.vllm != "colocate":
        return None
    for hundredths in range(5, 95, 5):
        changed = setup.changed(vllm_share=hundredths / 100)
        if plan_memory(changed).vllm_shortage <= 0:
            if changed.vllm_share == setup.vllm_share:
                return None
            return f"vllm_gpu_memory_utilization: {changed.vllm_share}", changed
    return None


def _sharding(name: str, stronger_than: tuple[str, ...]) -> Change:
    def change(setup: Setup) -> tuple[str, Setup] | None:
        if setup.processes == 1 or setup.sharding not in stronger_than or setup.quantized_bits is not None:
            return None
        if name == "zero3" and setup.critic == "adapter":  # the trainer refuses it
            return None
        return f"--sharding {name}", setup.changed(sharding=name)

    return change


def _adapter_critic(setup: Setup) -> tuple[str, Setup] | None:
    if setup.lora is None or setup.critic != "separate" or setup.sharding == "zero3":
        return None
    return "critic: adapter", setup.changed(critic="adapter")


def _shared_critic(setup: Setup) -> tuple[str, Setup] | None:
    if setup.critic != "separate":
        return None
    return "critic: shared", setup.changed(critic="shared")


def _no_reference(setup: Setup) -> tuple[str, Setup] | None:
    if setup.beta == 0 or setup.lora is not None:
        return None
    return "beta: 0.0", setup.changed(beta=0.0)


def _lora(setup: Setup) -> tuple[str, Setup] | None:
    if setup.lora is not None or (setup.critic == "separate" and setup.sharding == "zero3"):
        return None
    critic = "adapter" if setup.critic == "separate" else setup.critic
    # PEFT has no choice of its own for vision-language models.
    changed = setup.changed(lora=Lora(targets="all-linear"), critic=critic, weight_bytes=2)
    text = "use_peft: true, lora_target_modules: all-linear, dtype: bfloat16"
    return (text if critic == setup.critic else f"{text}, critic: adapter"), changed


CHANGES: tuple[Change, ...] = (
    # These leave the algorithm as it is …
    _smaller_micro_batch,
    _checkpointing,
    _sleep,
    _vllm_share,
    _sharding("zero2", ("none",)),
    _sharding("zero3", ("none", "zero2")),
    # … and these do not.
    _adapter_critic,
    _shared_critic,
    _no_reference,
    _lora,
)
"""The changes to try, in this order."""


def _four_bits(setup: Setup) -> tuple[str, Setup] | None:
    if setup.quantized_bits is not None or setup.lora is None or setup.processes > 1:
        return None
    critic = "adapter" if setup.critic == "separate" else setup.critic  # a quantized policy cannot be copied
    text = "load_in_4bit: true" + ("" if critic == setup.critic else ", critic: adapter")
    return text, setup.changed(quantized_bits=4, critic=critic)


def _no_vllm(setup: Setup) -> tuple[str, Setup] | None:
    if setup.vllm != "colocate":
        return None
    return "use_vllm: false", setup.changed(vllm=None)


def _smaller_rollout(setup: Setup) -> tuple[str, Setup] | None:
    if setup.mini_batches == 1:
        return None
    for number in range(setup.mini_batches - 1, 0, -1):  # no smaller than necessary
        changed = setup.changed(mini_batches=number)
        if plan_memory(changed).verdict == "fits":
            break
    return f"num_mini_batches {setup.mini_batches} → {changed.mini_batches}", changed


def _shorter_responses(setup: Setup) -> tuple[str, Setup] | None:
    changed, length = None, setup.completion_length // 2
    while length >= SHORTEST_RESPONSE:
        changed = setup.changed(completion_length=length)
        if plan_memory(changed).verdict == "fits":
            break
        length //= 2
    if changed is None:
        return None
    return f"max_completion_length {setup.completion_length} → {changed.completion_length}", changed


LAST_RESORTS: tuple[Change, ...] = (_four_bits, _no_vllm, _smaller_rollout, _shorter_responses)
"""Further changes of [`nearest`]: they cost speed or accuracy, or change the task."""

SHORTEST_RESPONSE = 256
"""Tokens. The planner suggests no shorter `max_completion_length`."""


def nearest(setup: Setup) -> Suggestion:
    """
    The set-up that fits after changes of any number, by more than the estimate's error if there is one. None of the
    changes can be left out. If nothing fits, it is the smallest set-up.

    Args:
        setup ([`Setup`]): a set-up that does not fit.

    Returns:
        [`Suggestion`]
    """
    # The micro-batch and the rollout are no smaller than necessary after the other changes.
    taken = [change for change in CHANGES if change is not _smaller_micro_batch]
    taken += [_smaller_micro_batch, *LAST_RESORTS]
    target = plan_memory(_made(setup, taken).setup)

    def is_as_good(plan: MemoryPlan) -> bool:
        if target.verdict == "fits":
            return plan.verdict == "fits"
        return plan.fits if target.fits else _lack(plan) <= _lack(target)

    for change in reversed(taken):  # the most costly first
        others = [other for other in taken if other is not change]
        if is_as_good(plan_memory(_made(setup, others).setup)):
            taken = others
    return _made(setup, taken)


def _lack(plan: MemoryPlan) -> float:
    """The bytes to compare set-ups by: at the peak, and vLLM's shortage."""
    return plan.total + max(plan.vllm_shortage, 0.0)


def _made(setup: Setup, changes: Sequence[Change]) -> Suggestion:
    """Make all possible changes, one after the other."""
    texts = []
    for change in changes:
        result = change(setup)
        if result is not None:
            text, setup = result
            texts.append(text)
    return Suggestion(tuple(texts), setup)


def suggest(setup: Setup, most: int = 3, largest: int = 3) -> list[Suggestion]:
    """
    Find the smallest sets of changes after which a setup fits.

    Args:
        setup ([`Setup`]): a setup, usually one that does not fit.
        most (`int`, *optional*, defaults to `3`): number of suggestions.
        largest (`int`, *optional*, defaults to `3`): number of changes in one suggestion.

    Returns:
        `list[Suggestion]`: sets of equal size, in the order of [`CHANGES`]; empty if none of these suffices.
    """
    for size in range(1, largest + 1):
        found: list[Suggestion] = []
        for combination in itertools.combinations(CHANGES, size):
            suggestion = _apply(setup, combination)
            if suggestion is not None and plan_memory(suggestion.setup).fits:
                found.append(suggestion)
            if len(found) == most:
                break
        if found:
            return found
    return []


def _apply(setup: Setup, changes: tuple[Change, ...]) -> Suggestion | None:
    """All of the changes, or `None` if one of them cannot be made."""
    texts = []
    # The micro-batch last: its size depends on the other changes.
    for change in sorted(changes, key=lambda change: change is _smaller_micro_batch):
        result = change(setup)
        if result is None:
            return None
        text, setup = result
        texts.append(text)
    return Suggestion(tuple(texts), setup)
