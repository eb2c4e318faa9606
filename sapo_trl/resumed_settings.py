"""A resumed run keeps its own settings: a checkpoint's optimizer state would bring the settings of the run before."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


logger = logging.getLogger(__name__)

# Keys of a parameter group that come from the settings, and their names in the warning. Other keys are state: some
# optimizers keep step counts and running sums there.
_SETTINGS = {
    "initial_lr": "learning rate",
    "weight_decay": "weight decay",
    "betas": "betas",
    "eps": "epsilon",
    "momentum": "momentum",
}

Settings = list[dict[str, Any]]


def optimizer_settings(optimizer: torch.optim.Optimizer) -> Settings:
    """The parameter groups without their parameters, for [`restore_settings`] after a checkpoint has been loaded."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # not every schedule notes it
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def restore_settings(
    whose: str,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    settings: Settings,
) -> None:
    """
    Let a resumed run go on with its own settings; a warning names each setting that differs from the checkpoint's.

    Args:
        whose (`str`): the model, for the warning: `"policy"`.
        optimizer (`torch.optim.Optimizer`): with the checkpoint's state.
        scheduler (`LRScheduler`, *optional*): its schedule, with the checkpoint's state.
        settings (`list[dict]`): from [`optimizer_settings`], before the checkpoint was loaded.

    Raises:
        ValueError: if the checkpoint's optimizer is of another kind.
    """
    changes: list[str] = []
    rates: list[float] = []
    for index, (group, fresh) in enumerate(zip(optimizer.param_groups, settings, strict=True)):
        if missing := sorted(fresh.keys() - group.keys()):
            raise ValueError(
                f"The {whose}'s optimizer in the checkpoint is of another kind than `optim` asks for: it has no "
                f"{missing[0]!r}. Set `optim` as it was, or delete `optimizer.pt` and `critic_optimizer.pt` from the "
                "checkpoint to begin with new optimizers."
            )
        own = {name: fresh[name] for name in _SETTINGS if name in fresh}
        changes += [
            f"{_SETTINGS[name]} {_text(group.get(name))} → {_text(value)}"
            for name, value in own.items()
            if not _same(group.get(name), value)
        ]
        base = group.get("initial_lr") or own["initial_lr"]
        group.update(own)
        rate = float(group["lr"])
        if isinstance(scheduler, LambdaLR):
            rate = own["initial_lr"] * scheduler.lr_lambdas[index](scheduler.last_epoch)
            if base == own["initial_lr"] and not _same(group["lr"], rate):
                # Another schedule, or the same schedule over another number of steps.
                changes.append(f"scheduled learning rate {_text(group['lr'])} → {_text(rate)}")
        elif base != own["initial_lr"]:
            rate *= own["initial_lr"] / base
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        rates.append(rate)
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [fresh["initial_lr"] for fresh in settings]
        scheduler._last_lr = rates
    if changes:
        logger.warning(
            "The settings of the %s's optimizer differ from the checkpoint's. The new ones apply from here on: %s.",
            whose,
            "; ".join(dict.fromkeys(changes)),  # groups that differ in their weight decay repeat the rest
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if one is None or other is None:
        return one is other
    return math.isclose(float(one), float(other), rel_tol=1e-6)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_text, value))})"
    return "none" if value is None else f"{float(value):g}"
