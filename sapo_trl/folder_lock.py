"""Locks a folder for one run at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .files import write_text


logger = logging.getLogger(__name__)

# Names with an underscore in front are not uploaded to the Hub with the folder.
LOCK_NAME = "_lock"
HOLDER_NAME = "_lock_holder.json"
"""File that describes the holder of the lock."""

# Error numbers without locks: some network file systems, or a lock daemon that does not run.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class FolderInUseError(ValueError):
    """Another process uses the folder, which only one process may use at a time."""


@contextlib.contextmanager
def locked(folder: str | Path, activity: str) -> Iterator[None]:
    """
    Reserve a folder for this process while the block runs. The block may lock the same folder again.

    The operating system holds the lock. It releases the lock when the process ends or is killed, so a dead run does
    not block the next run. On a file system without locks there is only a warning.

    Args:
        folder (`str` or `Path`): the folder. It is created if necessary.
        activity (`str`): the use of the folder, for the error in a second process, such as `"trains"`.

    Raises:
        FolderInUseError: if another process has the folder. The error names the process.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Use one object per path, so that the block can take the lock again. Do not fall back to filelock's soft lock: it
    # is a plain file and would outlive a killed process on another machine.
    lock = FileLock(folder.resolve() / LOCK_NAME, timeout=0, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise FolderInUseError(
            f"output_dir={str(folder)!r} is in use: {_holder(folder)}. Wait until it has ended, end it, or choose "
            "another `output_dir`."
        ) from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "The file system of %s has no locks (%s). Make sure that no other process uses this folder.",
            folder,
            error,
        )
        yield
        return
    try:
        if lock.lock_counter == 1:
            _write_holder(folder, activity)
        yield
    finally:
        if lock.lock_counter == 1:
            (folder / HOLDER_NAME).unlink(missing_ok=True)
        lock.release()


def _write_holder(folder: Path, activity: str) -> None:
    holder = {
        "activity": activity,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    write_text(folder / HOLDER_NAME, json.dumps(holder) + "\n")


def _holder(folder: Path) -> str:
    """The holder of the lock, from its own note."""
    try:
        holder = json.loads((folder / HOLDER_NAME).read_text(encoding="utf-8"))
        return (
            f"process {holder['pid']} on {holder['host']} {holder['activity']} there since {holder['since']} "
            f"({HOLDER_NAME})"
        )
    except (OSError, ValueError, KeyError, TypeError):  # the note is not written yet, or is damaged
        return "another process has locked it"
