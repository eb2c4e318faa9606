"""Work in a thread beside the training loop: a rollout that is requested before it is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar


T = TypeVar("T")

_GOODBYE_SECONDS = 5.0
"""Seconds that [`InFlight.abandon`] waits for the thread. Requests over HTTP end within a fraction of a second."""


class InFlight(Generic[T]):
    """
    A piece of work that has begun in a thread of its own.

    The thread is a daemon, so that it keeps no process alive.

    Args:
        work (`Callable`): takes an event that is set when nobody needs the result any more, and returns the result.
    """

    def __init__(self, work: Callable[[threading.Event], T]):
        self._work = work
        self._stop = threading.Event()
        self._is_done = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="rollout-ahead", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._work(self._stop)
        except BaseException as error:  # for the thread that asks for the result
            self._error = error
        finally:
            self._is_done.set()

    def wait(self) -> None:
        """Wait until the work is done, well or not. A signal interrupts the wait."""
        self._is_done.wait()

    def result(self) -> T:
        """Wait for the result, or raise the exception that ended the work."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._result

    def abandon(self) -> None:
        """Ask the work to end. Its result is lost."""
        self._stop.set()
        self._is_done.wait(_GOODBYE_SECONDS)
