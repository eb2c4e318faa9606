"""Ends a run with a checkpoint when the machine is taken away."""

from __future__ import annotations

import logging
import signal
from types import FrameType

import torch
from accelerate.utils import gather
from transformers import TrainerCallback


logger = logging.getLogger(__name__)

EXIT_CODE = 75
"""Exit code of `sapo-trl train` after a signal. In sysexits.h it means "temporary failure": start the run again."""


class StopOnSignal(TrainerCallback):
    """
    On SIGTERM, saves a checkpoint after the current optimizer step and ends training. Cluster schedulers send this
    signal before they kill a run. Resume with `resume_from_checkpoint=True`. Create the callback in the main thread of
    every process. It is enough if one process receives the signal.

    Args:
        signals (`tuple[int, ...]`, *optional*, defaults to `(signal.SIGTERM,)`): signals to act on.

    Example:

    ```python
    stop = StopOnSignal()
    trainer = SAPOTrainer(..., callbacks=[stop])
    trainer.train(resume_from_checkpoint=True)
    sys.exit(StopOnSignal.EXIT_CODE if stop.received else 0)
    ```
    """

    EXIT_CODE = EXIT_CODE

    def __init__(self, signals: tuple[int, ...] = (signal.SIGTERM,)):
        self.received: int | None = None
        self._own: int | None = None
        self._previous = {number: signal.signal(number, self._receive) for number in signals}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._own is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C ends the run at once
        logger.warning("%s received: a checkpoint follows after this step.", signal.Signals(number).name)
        self.received = self._own = number

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            # A signal reaches some processes before this step's end and others after it. All must stop at one step.
            number = torch.tensor([self._own or 0], device=args.device)
            self.received = int(gather(number).max()) or None
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
