"""
The program of a worker process: judges answers, one JSON line in, one out.

It is run by its path, gets the judge's folder as an argument, and imports nothing else of this package. So it starts
in a quarter of a second and loads no torch. See `worker_pool.py` for the other end.
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


# A fresh process now and then, so that nothing that piles up ever meets the limit of memory.
MAX_COMPARISONS = 10_000


def load_judge(folder: Path) -> Callable[[str, str], str]:
    """The function `judge` of the package in a folder, without the packages around it."""
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
    Have the kernel end this process, computing in C or not, when it has computed for so long or its parent is gone.

    Time is the process's own, not the clock's: how busy the machine is must not decide what is right. The parent's
    death closes the other end of the input, which raises SIGIO, deadly on Linux. A request would raise it too, but
    none comes before the reply. Between requests, and elsewhere, the process ends with its input.
    """
    flags = fcntl.fcntl(0, fcntl.F_GETFL)
    fcntl.fcntl(0, fcntl.F_SETFL, flags | os.O_ASYNC)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    fcntl.fcntl(0, fcntl.F_SETFL, flags)


def limit_memory(num_bytes: int) -> None:
    """Make what needs more a `MemoryError`, and no crash a core file."""
    if sys.platform != "darwin":  # which refuses this limit
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
    # What a hostile answer makes C libraries complain about is nobody's business.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    print(json.dumps("ready"), file=replies, flush=True)
    for _, request in zip(range(MAX_COMPARISONS), sys.stdin, strict=False):
        with kept_in_check(seconds):
            try:
                verdict = judge(*json.loads(request))
            except Exception:  # an answer that breaks the judge is not right, and the next one is judged
                verdict = "unparsed"
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main(seconds=float(sys.argv[1]), memory_bytes=int(sys.argv[2]), folder=Path(sys.argv[3]))
