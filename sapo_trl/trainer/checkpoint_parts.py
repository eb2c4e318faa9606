"""The parts of a run's state that a checkpoint holds besides TRL's: the critic, its warm-up, callbacks, trees."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..callbacks import RolloutCallback
from ..critic.training import CRITIC_FOLDER, CRITIC_OPTIMIZER_NAME, Critic
from ..critic.warmup import WARMUP_STATE_NAME, CriticWarmup
from ..rollouts import EdgeReplay
from ..rollouts.portable import from_portable, to_portable
from .checks import check_finite_weights
from .step_guard import StepGuard


logger = logging.getLogger(__name__)


class Checkpointed:
    """A part of a run's state. It has files of its own, or a share of the state that each process writes, or both."""

    def save(self, folder: Path) -> None:
        """Write files; called on all processes."""

    def load(self, folder: Path) -> list[str]:
        """Read them. Returns the parts that the checkpoint lacks and that begin anew, with their files' names."""
        return []

    def load_best(self, folder: Path) -> None:
        """Read models from the best checkpoint, at the end of training."""

    def state(self) -> dict[str, Any]:
        """This process's state, by names of its own: tensors, numbers, strings and containers of them."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore it from the state of all parts."""


class CriticPart(Checkpointed):
    """
    The critic's weights and optimizer.

    Args:
        critic ([`~sapo_trl.critic.training.Critic`], *optional*): `None` for a run without a critic that learns.
        setting (`str`): the run's `critic`.
    """

    def __init__(self, critic: Critic | None, setting: str):
        self.critic = critic
        self.setting = setting

    def save(self, folder: Path) -> None:
        if self.critic is not None:
            self.critic.save_optimizer(folder)

    def load(self, folder: Path) -> list[str]:
        if self.critic is None:
            if (folder / CRITIC_FOLDER).is_dir():
                logger.warning(
                    "The checkpoint %s holds a critic, which critic=%r does not use: a later checkpoint of this run "
                    "will hold none.",
                    folder,
                    self.setting,
                )
            return []
        is_whole = self.critic.load(folder)
        check_finite_weights(self.critic.module, f"The critic in {str(folder)!r}")
        if is_whole:
            return []
        return [f"the critic's optimizer and learning rate schedule ({CRITIC_OPTIMIZER_NAME})"]

    def load_best(self, folder: Path) -> None:
        if self.critic is not None:
            self.critic.load_weights(folder)


class WarmupPart(Checkpointed):
    """
    How far the critic's warm-up is.

    Args:
        warmup ([`~sapo_trl.critic.warmup.CriticWarmup`]): the warm-up.
        should_save (`bool`): whether this process writes files.
    """

    def __init__(self, warmup: CriticWarmup, should_save: bool):
        self.warmup = warmup
        self.should_save = should_save

    def save(self, folder: Path) -> None:
        if self.should_save:
            self.warmup.save(folder)

    def load(self, folder: Path) -> list[str]:
        if self.warmup.load(folder) or self.warmup.tolerance is None:
            return []
        return [f"the critic's warm-up ({WARMUP_STATE_NAME})"]


class SkippedSteps(Checkpointed):
    """
    How many optimizer steps in a row were skipped.

    Args:
        guard ([`StepGuard`]): counts them.
    """

    def __init__(self, guard: StepGuard):
        self.guard = guard

    def state(self) -> dict[str, Any]:
        return {"skipped_in_a_row": self.guard.in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        self.guard.in_a_row = state.get("skipped_in_a_row", 0)


class CallbackStates(Checkpointed):
    """
    The states of the callbacks that see rollouts. Several of one class get theirs in the order of the callbacks.

    Args:
        callbacks (`Callable`): returns the callbacks of the run. More may be added at any time.
    """

    def __init__(self, callbacks: Callable[[], list[RolloutCallback]]):
        self.callbacks = callbacks

    def state(self) -> dict[str, Any]:
        states = []
        for callback in self.callbacks():
            name = type(callback).__name__
            try:
                states.append([name, to_portable(callback.state_dict())])
            except TypeError as error:
                logger.warning("The checkpoint is written without the state of the callback %s: %s", name, error)
        return {"callbacks": states}

    def load_state(self, state: dict[str, Any]) -> None:
        saved = list(state.get("callbacks", []))
        for callback in self.callbacks():
            name = type(callback).__name__
            place = next((place for place, (saved_name, _) in enumerate(saved) if saved_name == name), None)
            if place is not None:
                callback.load_state_dict(from_portable(saved.pop(place)[1]))


class ReplayPart(Checkpointed):
    """
    The edges of earlier trees.

    Args:
        replay ([`~sapo_trl.rollouts.EdgeReplay`]): keeps them.
    """

    def __init__(self, replay: EdgeReplay):
        self.replay = replay

    def state(self) -> dict[str, Any]:
        try:
            return {"replay": self.replay.state()}
        except TypeError as error:
            logger.warning("The checkpoint is written without the edges of earlier trees: %s", error)
            return {}

    def load_state(self, state: dict[str, Any]) -> None:
        if "replay" in state:
            self.replay.load_state(state["replay"])
