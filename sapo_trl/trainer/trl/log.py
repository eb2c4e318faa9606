"""TRL's measurements for its next log entry: additions, corrections, and their way into checkpoints."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback
from trl import GRPOTrainer

from ...distributed import Processes
from ...metric_names import with_old_names, with_present_names
from ...rollouts.portable import from_portable, to_portable
from ..checkpoint_parts import Checkpointed


logger = logging.getLogger(__name__)


class PendingLog(TrainerCallback, Checkpointed):
    """
    The measurements and the completions since the last log entry.

    They are a part of the checkpoint: a resumed run's next entry equals an uninterrupted run's.

    Args:
        trainer ([`~trl.GRPOTrainer`]): keeps them in private fields.
        processes ([`~sapo_trl.distributed.Processes`]): of the run.
    """

    def __init__(self, trainer: GRPOTrainer, processes: Processes):
        self.trainer = trainer
        self.processes = processes
        self._loaded: dict[str, Any] | None = None

    def add(self, metrics: dict[str, float], mode: str) -> None:
        """Add values to the averages that the next entry of a mode reports."""
        for name, value in with_old_names(metrics).items():
            self.trainer._metrics[mode][name].append(value)

    def replace(self, name: str, value: float, mode: str) -> None:
        """Replace the value that TRL has just added."""
        self.trainer._metrics[mode][name][-1:] = [value]

    def replace_advantages(self, advantages: list[float]) -> None:
        """Replace GRPO's advantages in the completions table by the rollout's, of all processes."""
        logged = self.trainer._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages)

    def first_rewards(self, number: int) -> dict[str, float]:
        """Rewards of the first of the latest `number` responses, by reward function; NaN is none."""
        columns = self.trainer._logs["rewards"]
        return {name: rewards[-number] for name, rewards in columns.items() if len(rewards) >= number}

    def add_columns(self, columns: dict[str, list]) -> None:
        """Add columns about the latest rollout to the completions table: an entry for each of this process's rows."""
        logs = self.trainer._logs
        for name, values in columns.items():
            logs["extra"][name].extend(self.processes.gather_objects(values))
        # wandb refuses a table whose cells are lists of dictionaries with unequal keys, which is how TRL writes down
        # prompts with images: the run would end at its first log.
        prompts = [_with_plain_content(prompt) for prompt in logs["prompt"]]
        logs["prompt"].clear()
        logs["prompt"].extend(prompts)

    @contextlib.contextmanager
    def without_additions(self) -> Iterator[None]:
        """Forget the logs of reward functions inside: they are not about the rollout's responses."""
        trainer = self.trainer
        logged = copy.deepcopy((trainer._pending_metrics, trainer._pending_extra_logs))
        try:
            yield
        finally:
            trainer._pending_metrics, trainer._pending_extra_logs = logged

    def state(self) -> dict[str, Any]:
        trainer = self.trainer
        state = {
            "metrics": {
                name: [float(value) for value in values] for name, values in trainer._metrics["train"].items()
            },
            "loss": trainer._tr_loss,
            "last_logged": trainer._globalstep_last_logged,
        }
        if trainer.log_completions and self.processes.accelerator.is_main_process:
            try:
                state["table"] = to_portable(_lists(trainer._logs))
            except TypeError as error:
                logger.warning("The checkpoint is written without the completions table: %s", error)
        return {"log": state}

    def load_state(self, state: dict[str, Any]) -> None:
        self._loaded = state.get("log")  # checkpoints of earlier versions have none

    def on_train_begin(self, args, state, control, **kwargs):
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        trainer = self.trainer
        for name, values in with_old_names(with_present_names(loaded["metrics"])).items():
            trainer._metrics["train"][name] = list(values)
        # The final entry's mean loss is over the steps that this call of `train` runs.
        trainer._total_loss_scalar -= loaded["loss"].item()
        trainer._tr_loss += loaded["loss"]
        trainer._globalstep_last_logged = loaded["last_logged"]
        _extend(trainer._logs, from_portable(loaded.get("table", {})))


def _lists(columns: dict[str, Any]) -> dict[str, Any]:
    """The completions table with lists instead of queues."""
    return {name: _lists(rows) if isinstance(rows, dict) else list(rows) for name, rows in columns.items()}


def _extend(columns: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Put rows of [`_lists`] back into the completions table."""
    for name, rows in loaded.items():
        if isinstance(rows, dict):
            _extend(columns[name], rows)
        else:
            columns[name].extend(rows)


def _with_plain_content(prompt: Any) -> Any:
    """A conversation whose messages hold text, `[IMAGE]` for an image; plain text as it is."""
    if isinstance(prompt, str):
        return prompt
    return [
        {**message, "content": "".join(part.get("text", f"[{part['type'].upper()}]") for part in message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]
