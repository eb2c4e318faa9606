"""Reads a run's log."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd

from ..json_files import read_json, read_json_lines
from ..metric_names import with_old_names, with_present_names
from ..run_folder import TRAINER_STATE_NAME, newest_checkpoint
from .columns import REWARD
from .tables import as_frame, check_column


logger = logging.getLogger(__name__)


def read_log_history(path: str | Path) -> pd.DataFrame:
    """
    Read a run's log. A last line that is cut, as by a run that was killed, is left out with a warning.

    Args:
        path (`str` or `Path`):
            a `trainer_state.json` (checkpoints have one; `trainer.save_state()` writes one into the output folder), a
            file with one JSON object per line (`.jsonl`), or a folder. In a folder the first of these counts: its
            `trainer_state.json`, its last checkpoint's, its only `.jsonl` file.

    Returns:
        `pd.DataFrame`:
            one row per entry, in order, NaN where an entry lacks a name. Metrics have their present names, also in a
            log of an earlier release; until release 0.2.0 there are columns with the old names, too.

    Raises:
        ValueError: if there is no log, or if it cannot be read.
    """
    log, notes = read_log(Path(path))
    for note in notes:
        logger.warning(note)
    return pd.DataFrame(with_old_names(dict(log.items())))


def read_log(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """[`read_log_history`], with notes instead of warnings, and without the old names."""
    if path.is_dir():
        path = _log_file(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file or folder.")
    notes: list[str] = []
    if path.suffix == ".jsonl":
        entries, notes = read_json_lines(path)
    else:
        content = read_json(path)
        if not isinstance(content, dict) or "log_history" not in content:
            raise ValueError(f"{path}: no `log_history` in it; a `trainer_state.json` or a `.jsonl` is read.")
        entries = content["log_history"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: the log must have at least one entry, each an object of names and numbers.")
    log = as_frame(path, [with_present_names(entry) for entry in entries])
    if "step" in log:
        check_column(path, log["step"], REWARD)
        log["step"] = pd.to_numeric(log["step"])  # of cells that are all empty, pandas would make objects
    return log, notes


def _log_file(folder: Path) -> Path:
    if (folder / TRAINER_STATE_NAME).is_file():
        return folder / TRAINER_STATE_NAME
    if (checkpoint := newest_checkpoint(folder)) is not None:
        return checkpoint / TRAINER_STATE_NAME
    lines = sorted(folder.glob("*.jsonl"))
    if len(lines) != 1:
        raise ValueError(
            f"{folder}: neither a `{TRAINER_STATE_NAME}`, nor a checkpoint with one, nor exactly one `.jsonl` file "
            f"(it has {len(lines)}). `trainer.save_state()` writes the first."
        )
    return lines[0]
