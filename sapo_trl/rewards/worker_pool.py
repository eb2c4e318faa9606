"""Worker processes that compare answers. No answer can exceed their limits of time and memory."""

from __future__ import annotations

import json
import queue
import select
import signal
import subprocess
import sys
import time
from pathlib import Path


_PROGRAM = Path(__file__).with_name("judge_worker.py")
_JUDGE = Path(__file__).with_name("judge")

# Importing from a slow network disk takes a while.
_SECONDS_TO_START = 120

# A worker limits its own computing time. On a busy machine this takes longer by the clock. If it needs so many seconds
# more, it is stuck.
_PATIENCE = 60


class WorkerPool:
    """
    A few worker processes. A process is started when there is work for it, and replaced when it dies.

    Any number of threads may use the pool at once. After a fork the child needs its own pool and calls [`forget`] on
    this pool.

    Args:
        num_workers (`int`, *optional*, defaults to `2`):
            Largest number of processes, some 30 MB each.
        timeout (`float`, *optional*, defaults to `5.0`):
            Seconds of computing for one comparison. A worker that needs more is killed. A worker that does not reply
            within another minute is also killed.
        memory_bytes (`int`, *optional*, defaults to `2 << 30`):
            Address space of a worker.
    """

    def __init__(self, num_workers: int = 2, timeout: float = 5.0, memory_bytes: int = 2 << 30):
        if num_workers < 1:
            raise ValueError(f"`num_workers` must be at least 1, got {num_workers}.")
        if not 0 < timeout < float("inf"):
            raise ValueError(f"`timeout` must be a finite number of seconds above 0, got {timeout}.")
        if memory_bytes < 256 << 20:
            raise ValueError(f"`memory_bytes` must leave room for Python, 256 MiB ({256 << 20}), got {memory_bytes}.")
        self.num_workers = num_workers
        self.timeout = timeout
        self.memory_bytes = memory_bytes
        self._workers = [Worker(timeout, memory_bytes) for _ in range(num_workers)]
        # Last in, first out: a single thread uses only one process and never starts another.
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def compare(self, answer: str, gold: str) -> str | None:
        """Compare with the next free worker, see [`Worker.compare`]."""
        worker = self._idle.get()
        try:
            return worker.compare(answer, gold)
        finally:
            self._idle.put(worker)

    def processes(self) -> list[int]:
        """Ids of the started processes that are not known to be dead."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    def close(self) -> None:
        """End all processes. Threads that still compare start new processes, which end with this process."""
        for worker in self._workers:
            worker.kill()

    def forget(self) -> None:
        """In a forked child: close the pipes to the parent's processes. Otherwise they would outlive the parent."""
        for worker in self._workers:
            worker.forget()


class Worker:
    """One worker process. It may not have been started yet."""

    def __init__(self, timeout: float, memory_bytes: int):
        self.timeout = timeout
        self.memory_bytes = memory_bytes
        self.process: subprocess.Popen | None = None

    def compare(self, answer: str, gold: str) -> str | None:
        """
        The verdict of `judge`, or `None` if it ran out of time or killed its process.

        Raises:
            RuntimeError: if no worker process can be started.
        """
        request = json.dumps([answer, gold]).encode() + b"\n"  # ASCII, lone surrogates included
        try:
            # A process can also die for reasons unrelated to the answer. So try a second time with another process.
            for _ in range(2):
                process = self._running()
                try:
                    process.stdin.write(request)
                    reply = _read_line(process, self.timeout + _PATIENCE)
                except BrokenPipeError:
                    reply = None
                if reply is not None:
                    return json.loads(reply)
                out_of_time = process.wait() == -signal.SIGPROF
                self.stop()
                if out_of_time:
                    break
        except TimeoutError:
            self.stop()
        except BaseException:
            # The thread was interrupted. The pending reply must not become the reply to the next request.
            self.stop()
            raise
        return None

    def kill(self) -> None:
        """Kill the process. Any thread may call this: a thread that waits for a reply sees the end of the output."""
        process = self.process
        if process is not None:
            process.kill()
            process.wait()

    def stop(self) -> None:
        """Kill the process and close the pipes to it."""
        process, self.process = self.process, None
        if process is not None:
            _end(process)

    def forget(self) -> None:
        """Close the pipes to a process that belongs to another process."""
        process, self.process = self.process, None
        if process is not None:
            process.returncode = 0  # only its parent may wait for it
            process.stdin.close()
            process.stdout.close()

    def _running(self) -> subprocess.Popen:
        if self.process is not None and self.process.poll() is not None:
            self.stop()
        if self.process is None:
            self.process = self._started()
        return self.process

    def _started(self) -> subprocess.Popen:
        # Run a separate program. `multiprocessing` would import the user's main module once more, or fork a process
        # that has threads and a GPU. -P keeps this folder, with its `format.py`, off the import path. In its own
        # process group the program does not receive Ctrl-C; it ends with its input.
        process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), str(self.timeout), str(self.memory_bytes), str(_JUDGE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,
        )
        try:
            reply = _read_line(process, _SECONDS_TO_START)
            if reply is None:
                raise RuntimeError(f"The worker process that judges answers ended with exit code {process.wait()}.")
            if json.loads(reply) != "ready":
                raise RuntimeError(f"The worker process that judges answers did not start: {json.loads(reply)}")
        except TimeoutError:
            _end(process)
            raise RuntimeError(f"The worker process that judges answers needed over {_SECONDS_TO_START} s.") from None
        except BaseException:
            _end(process)
            raise
        return process


def _end(process: subprocess.Popen) -> None:
    """Kill a process, wait for its end and close the pipes to it."""
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def _read_line(process: subprocess.Popen, seconds: float) -> bytes | None:
    """A line of a process's output, `None` if it has ended. Raises `TimeoutError`."""
    poll = select.poll()  # `select.select` takes no descriptor above 1023
    poll.register(process.stdout, select.POLLIN)
    deadline = time.monotonic() + seconds
    line = b""
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        piece = process.stdout.read(4096)
        if not piece:
            return None
        line += piece
    return line
