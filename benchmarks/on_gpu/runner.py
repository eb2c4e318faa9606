"""Runs rows one by one, each in a process of its own, within a time limit."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import ROOT, variables
from .row_list import Row


OUT_OF_MEMORY = "out of memory"
# A row is killed when it takes so many times its expected time. Tiny models are for trials on a CPU that may be busy.
PATIENCE = {"3b": 4, "tiny": 20}

Report = dict[str, Any]
"""
Contents of `on_gpu.json`: machine, versions and size; `rows`, the finished and the failed ones by name; and `cut_off`,
seconds of the rows that the time limit stopped. These run again.
"""


@dataclass
class Runner:
    """
    Runs the rows of a list that a report does not have yet.

    Args:
        python (`Path`): Python of the rows.
        report (`dict`): where their numbers go.
        size (`str`): size of the model.
        deadline (`float`): when to stop, on the clock of `time.monotonic`.
        log (`Path`): file for all output of the rows.
        write (`Callable`): called after each row.
    """

    python: Path
    report: Report
    size: str
    deadline: float
    log: Path
    write: Callable[[Report], None]
    say: Callable[[str], None] = functools.partial(print, flush=True)

    def run(self, rows: Iterable[Row]) -> list[Row]:
        """Run the rows in their order. Rows without enough time are left out, and returned."""
        left_out = []
        for row in rows:
            if row.name in self.report["rows"]:
                continue
            expected, left = self.expected(row), self.deadline - time.monotonic()
            if expected > left:
                left_out.append(row)
                continue
            self.say(f"{row.name}: {row.title}, about {expected:.0f} s; {left:.0f} s are left")
            patience = PATIENCE[self.size] * expected
            found = self.run_row(row, min(left, patience))
            if found.pop("killed") and left < patience:
                self.report["cut_off"][row.name] = found["took"]
                left_out.append(row)
            else:
                self.report["cut_off"].pop(row.name, None)
                self.report["rows"][row.name] = found
            self.write(self.report)
            self.say(f"{row.name}: {found.get('error', 'done')}, {found['took']:.0f} s")
        return left_out

    def expected(self, row: Row) -> float:
        """Seconds that a row will take. Finished rows say how fast this machine is."""
        done = [found for found in self.report["rows"].values() if "error" not in found]
        pace = statistics.median(found["took"] / found["expected"] for found in done) if done else 1.0
        # A row that the time limit stopped needs more time than it had.
        return max(pace * row.expected(self.size), self.report["cut_off"].get(row.name, 0.0))

    def run_row(self, row: Row, limit: float) -> dict[str, Any]:
        """
        Run a row's command, and read the JSON file that it writes.

        Args:
            row ([`Row`]): the row.
            limit (`float`): seconds until it is killed, together with its own processes.

        Returns:
            `dict[str, Any]`: `title` and `command`; `expected` and `took`, in seconds; `killed`, whether it took too
            long; and `result` or `error`, or both if it wrote a part of its result before it failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "output.txt"
            results = Path(folder) / "results"
            results.mkdir()
            words = shlex.split(row.arguments(self.size))
            script, *arguments = (word.replace("{folder}", str(results)) for word in words)
            started = time.monotonic()
            code = self._call([str(self.python), str(ROOT / "benchmarks" / script), *arguments], output, limit)
            took = time.monotonic() - started
            found: dict[str, Any] = {"title": row.title, "command": row.arguments(self.size)}
            found |= {"expected": row.expected(self.size), "took": took, "killed": code is None}
            text = output.read_text(errors="replace")
            with self.log.open("a") as log:
                log.write(f"==== {row.name}: {found['command']}\n{text}\n")
            found |= _result(results)
        if code is None:
            found["error"] = f"stopped after {took:.0f} s"
        elif code and "error" not in found:
            found["error"] = _ended_by(-code) if code < 0 else _last_line(text)
        elif not code and "result" not in found and "error" not in found:
            found["error"] = "wrote no result"
        return found

    def _call(self, command: list[str], output: Path, limit: float) -> int | None:
        """Exit code of a command, or `None` if it was killed."""
        with output.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=variables(), start_new_session=True
            )
            try:
                return process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                # Also when the user interrupts: nothing of a row outlives it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _result(folder: Path) -> dict[str, Any]:
    """The numbers in the folder's JSON file. A file that was being written when the row was killed has none."""
    files = sorted(folder.glob("*.json"))
    if not files:
        return {}
    try:
        found = json.loads(files[0].read_text())
    except json.JSONDecodeError:
        return {}
    return {"error": found["error"]} if "error" in found else {"result": found}


def _ended_by(number: int) -> str:
    """The error of a process that a signal ended. Only the system itself kills: where memory is short."""
    return OUT_OF_MEMORY if number == signal.SIGKILL else f"ended by {signal.Signals(number).name}"


def _last_line(text: str) -> str:
    """The line that names the error, in a short form."""
    line = ([line.strip() for line in text.splitlines() if line.strip()] or ["no message"])[-1]
    return OUT_OF_MEMORY if "OutOfMemoryError" in line else line[:200]
