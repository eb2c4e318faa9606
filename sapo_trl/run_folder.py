"""The checkpoints in a run's folder, and which of them is the newest. Imports nothing that takes time."""

from __future__ import annotations

import json
import re
from pathlib import Path


# The names that transformers gives.
TRAINER_STATE_NAME = "trainer_state.json"
CHECKPOINT_PREFIX = "checkpoint"

PUBLICATION_NAME = "publication.json"
"""In each checkpoint: its place in the order in which the checkpoints of a run folder were published."""

_NAME = re.compile(rf"{CHECKPOINT_PREFIX}-(\d+)")


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint of an optimizer step."""
    return f"{CHECKPOINT_PREFIX}-{step}"


def complete_checkpoints(run_folder: str | Path) -> list[Path]:
    """
    The complete checkpoints of a run folder, in the order in which they were published.

    Neither their steps nor the times of their files tell the order: a run that goes back to an early checkpoint writes
    lower steps after higher ones, and clocks are set back.

    Args:
        run_folder (`str` or `Path`): where the run's checkpoints are; it need not exist.

    Returns:
        `list[Path]`: oldest first. Checkpoints of other trainers, which have no number of publication, come first, in
        the order of their steps.
    """
    found = []
    for folder in Path(run_folder).glob(f"{CHECKPOINT_PREFIX}-*"):
        match = _NAME.fullmatch(folder.name)
        # Written last, and by nothing but a trainer.
        if match and (folder / TRAINER_STATE_NAME).is_file():
            found.append((publication_number(folder), int(match[1]), folder))
    return [folder for *_, folder in sorted(found)]


def newest_checkpoint(run_folder: str | Path) -> Path | None:
    """The complete checkpoint that was published last, if there is one."""
    return next(reversed(complete_checkpoints(run_folder)), None)


def publication_number(checkpoint: Path) -> int:
    """A checkpoint's place in the order of publication, from 1; 0 if another trainer has written it."""
    try:
        return int(json.loads((checkpoint / PUBLICATION_NAME).read_text(encoding="utf-8"))["number"])
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(checkpoint / PUBLICATION_NAME)!r} is damaged ({error!r}): delete this file."
        ) from error
