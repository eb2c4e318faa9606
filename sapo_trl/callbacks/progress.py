"""The progress display of `sapo-trl train`."""

from __future__ import annotations

import re
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback


# Logged names and their titles.
SHOWN = {
    "reward": "reward",
    "entropy": "entropy",
    "critic/loss": "value loss",
    "critic/explained_variance": "explained",
    "completions/mean_length": "tokens",
}


class TrainingProgress(TrainerCallback):
    """
    A bar with the time left and the latest numbers; where no bar can be drawn, a line for each log.

    Args:
        console ([`~rich.console.Console`], *optional*): the console to write to. Defaults to the terminal.
        algorithm (`str`, *optional*, defaults to `""`): the algorithm's name.
    """

    def __init__(self, console: Console | None = None, algorithm: str = ""):
        self.console = console or Console()
        self.algorithm = algorithm
        self._began: tuple[float, int] | None = None
        self._bar: Progress | None = None
        self._task = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._began = (time.monotonic(), state.global_step)
        if not state.is_world_process_zero:
            return
        if not self.console.is_terminal:
            if self.algorithm:
                self.console.print(f"Training {self.algorithm}", soft_wrap=True, highlight=False)
            return
        self._bar = Progress(
            TextColumn(f"Training {self.algorithm}".rstrip()),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[news]}"),
            console=self.console,
        )
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, news="")
        self._bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        evaluated = _news({name.removeprefix("eval_"): x for name, x in logs.items() if name.startswith("eval_")})
        if evaluated:
            self.console.print(f"step {state.global_step}, evaluation: {evaluated}", soft_wrap=True, highlight=False)
            return
        news = _news(logs)
        if self._bar is not None:
            self._bar.update(self._task, news=news)
        elif news:
            line = f"step {state.global_step}/{state.max_steps}{self._time_left(state)}: {news}"
            self.console.print(line, soft_wrap=True, highlight=False)

    def _time_left(self, state) -> str:
        """The time left at the speed of the steps of this call so far; nothing before the first step."""
        if self._began is None or state.global_step <= self._began[1]:
            return ""
        began, first = self._began
        left = (time.monotonic() - began) * (state.max_steps - state.global_step) / (state.global_step - first)
        return f", {timedelta(seconds=round(left))} left"

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _news(logs: dict[str, float]) -> str:
    of_functions = {name: match[1] for name in logs if (match := re.fullmatch("rewards/(.+)/mean", name))}
    if len(of_functions) == 1 and "reward" in logs:  # the same number
        of_functions = {}
    total, *others = SHOWN.items()
    shown = dict([total, *of_functions.items(), *others])
    return ", ".join(f"{title} {logs[name]:.3g}" for name, title in shown.items() if name in logs)


def show_progress(trainer: Trainer, console: Console | None = None, algorithm: str = "") -> None:
    """
    Replace transformers' own bar and prints. `disable_tqdm=True` asks for prints: then they stay.

    Args:
        trainer ([`~transformers.Trainer`]): the trainer.
        console ([`~rich.console.Console`], *optional*): the console to write to. Defaults to the terminal.
        algorithm (`str`, *optional*, defaults to `""`): the algorithm's name.
    """
    if trainer.args.disable_tqdm:
        return
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(TrainingProgress(console, algorithm))
