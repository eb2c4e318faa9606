"""A folder belongs to one process at a time, and a killed process gives it back."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from sapo_trl.folder_lock import HOLDER_NAME, FolderInUseError, locked


HOLD = """
import os, sys, time
from sapo_trl.folder_lock import locked
with locked(sys.argv[1], "trains"):
    if os.fork() == 0:
        # From the child: by now it has given its copy of the lock back.
        print("held", flush=True)
        os.close(1)
        time.sleep(60)
        os._exit(0)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path):
    """A process that holds the folder's lock, with a child that it has forked meanwhile."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_error_names_who_has_it(tmp_path):
    with holder(tmp_path) as process:
        with pytest.raises(FolderInUseError) as error, locked(tmp_path, "evaluates"):
            pass
        message = str(error.value)
        for part in (repr(str(tmp_path)), f"process {process.pid} on {os.uname().nodename} trains there since 2"):
            assert part in message


def test_a_killed_process_does_not_block_the_next(tmp_path):
    """Not even while a child that it has forked lives on."""
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        assert (tmp_path / HOLDER_NAME).is_file()  # nobody has tidied up
        with locked(tmp_path, "trains"):
            assert str(os.getpid()) in (tmp_path / HOLDER_NAME).read_text()


def test_it_can_be_taken_again_by_its_holder_and_is_free_afterwards(tmp_path):
    for _ in range(2):
        with locked(tmp_path, "trains"), pytest.raises(KeyError):
            with locked(tmp_path / ".." / tmp_path.name, "saves"):
                raise KeyError
            raise AssertionError
        assert not (tmp_path / HOLDER_NAME).exists()
    with holder(tmp_path):
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path, "trains"):
        pass
    (record,) = caplog.records
    assert f"The file system of {tmp_path} has no locks" in record.getMessage()


def test_a_link_in_the_place_of_the_note_is_replaced_and_not_written_through(tmp_path):
    other = tmp_path / "other"
    other.write_text("of someone else")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / HOLDER_NAME).symlink_to(other)
    with locked(folder, "trains"):
        assert not (folder / HOLDER_NAME).is_symlink() and str(os.getpid()) in (folder / HOLDER_NAME).read_text()
    assert other.read_text() == "of someone else"
