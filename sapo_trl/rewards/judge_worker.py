"""
The program of a worker process, which judges answers. It reads one JSON line per request and writes one as reply.

It is run by its path, gets the judge's folder as an argument, and imports nothing else from this package. So it starts
in a quarter of a second and does not load torch. The parent's side is in `worker_pool.py`.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


# The process ends after so many comparisons, so that growing memory never reaches the limit.
MAX_COMPARISONS = 10_000


def load_judge(folder: Path) -> Callable[[str, str], str]:
    """The function `judge` of the package in a folder, loaded without its parent packages."""
    spec = importlib.util.spec_from_file_location(
        "answer_judge", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.judge


@contextlib.contextmanager
def kept_in_check(seconds: float) -> Iterator[None]:
    """
    Let the kernel end this process if it computes for too long or its parent dies, even while it computes in C.

    The limit is processor time, not the clock's time, so that a busy machine does not make right answers wrong. The
    parent's death closes the other end of the input. This raises SIGIO, which ends the process on Linux. A request
    would raise it too, but no request comes before the reply. Between requests, and on other systems, the process ends
    with its input.
    """
    flags = fcntl.fcntl(0, fcntl.F_GETFL)
    fcntl.fcntl(0, fcntl.F_SETFL, flags | os.O_ASYNC)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    fcntl.fcntl(0, fcntl.F_SETFL, flags)


def limit_memory(num_bytes: int) -> None:
    """Limit the process's memory, so that it raises `MemoryError` beyond the limit. Switch core files off."""
    if sys.platform != "darwin":  # macOS refuses this limit
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(seconds: float, memory_bytes: int, folder: Path) -> None:
    """Answer requests until the input ends."""
    # Only replies may reach the parent.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        limit_memory(memory_bytes)
        judge = load_judge(folder)
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    except BaseException as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), file=replies, flush=True)
        raise
    # Discard all other output: hostile answers may make C libraries print messages.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    print(json.dumps("ready"), file=replies, flush=True)
    for _, request in zip(range(MAX_COMPARISONS), sys.stdin, strict=False):
        with kept_in_check(seconds):
            try:
                verdict = judge(*json.loads(request))
            except Exception:  # an answer that breaks the judge is wrong, and the next answer is judged
                verdict = "unparsed"
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main(seconds=float(sys.argv[1]), memory_bytes=int(sys.argv[2]), folder=Path(sys.argv[3]))
