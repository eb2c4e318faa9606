"""The progress display of `sapo-trl train`."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback


# Logged names and their titles.
SHOWN = {
    "reward": "reward",
    "rewards/accuracy_reward/mean": "accuracy",
    "entropy": "entropy",
    "value_loss": "value loss",
    "value/explained_variance": "explained",
    "completions/mean_length": "tokens",
}


class TrainingProgress(TrainerCallback):
    """
    A bar with the time left and the latest numbers; where no bar can be drawn, a line for each log.

    Args:
        console ([`~rich.console.Console`], *optional*): the console to write to. Defaults to the terminal.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self._bar: Progress | None = None
        self._task = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("Training"),
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
            self.console.print(f"step {state.global_step}/{state.max_steps}: {news}", soft_wrap=True, highlight=False)

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _news(logs: dict[str, float]) -> str:
    return ", ".join(f"{title} {logs[name]:.3g}" for name, title in SHOWN.items() if name in logs)


def show_progress(trainer: Trainer, console: Console | None = None) -> None:
    """Replace transformers' own bar and prints. `disable_tqdm=True` asks for prints: then they stay."""
    if trainer.args.disable_tqdm:
        return
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(TrainingProgress(console))
