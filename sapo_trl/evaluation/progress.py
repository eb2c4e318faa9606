"""Shows progress: in a terminal as a bar with the time left, elsewhere as a line now and then."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


LINE_SECONDS = 30.0


class Steps:
    """
    A context manager that counts steps.

    Args:
        console ([`~rich.console.Console`]): console for the progress.
        name (`str`): name of the stage.
        total (`int`): number of all steps.
        done (`int`, *optional*, defaults to `0`): number of earlier steps. The time left is estimated without them.
    """

    def __init__(self, console: Console, name: str, total: int, done: int = 0):
        self.console = console
        self.name = name
        self.total = total
        self.before = self.done = done
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task(name, total=total, completed=done)

    def __enter__(self) -> Steps:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif kind is None and self.total:
            self._line()

    def advance(self, steps: int = 1) -> None:
        """Count more steps."""
        self.done += steps
        if self.bar is not None:
            self.bar.advance(self.task, steps)
        elif self.done < self.total and time.monotonic() - self.last_line > LINE_SECONDS:
            self._line()

    def _line(self) -> None:
        self.last_line = time.monotonic()
        seconds = self.last_line - self.started
        left = ""
        if self.before < self.done < self.total:
            left = f", about {_duration(seconds / (self.done - self.before) * (self.total - self.done))} left"
        self.console.print(
            f"{self.name}: {self.done} of {self.total}, {_duration(seconds)}{left}",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
