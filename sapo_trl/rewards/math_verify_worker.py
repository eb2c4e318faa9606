"""
The program of a worker process: compares answers by math-verify, one JSON line in, one out.

It is run by its path and imports nothing of this package, so it starts in half a second and loads no torch. See
`worker_pool.py` for the other end.
"""

import contextlib
import fcntl
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator


# A fresh process now and then, so that nothing that piles up in sympy's caches ever meets the limit of memory.
MAX_COMPARISONS = 1000


def compare(answer: str, gold: str) -> str:
    """`"equal"`, `"different"`, or `"unparsed"` if math-verify finds no mathematics in one of the two."""
    from math_verify import LatexExtractionConfig, parse, verify

    # The whole of `$...$` as LaTeX or nothing. By default math-verify also looks for boxes, and for plain numbers in
    # what is no LaTeX: bare `6 \sqrt { 3 }` is read as 3, and `0.\overline{3}` as 0.
    whole = [LatexExtractionConfig(boxed_match_priority=-1)]
    # Its own time limits are signals handled by Python, which come too late for a computation in C.
    parsed_gold, parsed_answer = (
        parse(f"${latex}$", whole, extraction_mode="first_match", parsing_timeout=None) for latex in (gold, answer)
    )
    if verify(parsed_gold, parsed_answer, timeout_seconds=None):
        return "equal"
    # Beside an expression, or alone, stands the text itself.
    understood = all(any(not isinstance(x, str) for x in parsed) for parsed in (parsed_gold, parsed_answer))
    return "different" if understood else "unparsed"


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


def main(seconds: float, memory_bytes: int) -> None:
    """Answer requests until the input ends."""
    # Parsers print; only replies may reach the parent.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.disable()
    try:
        limit_memory(memory_bytes)
        compare("1", "2")  # imports what it needs
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
            verdict = compare(*json.loads(request))
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main(seconds=float(sys.argv[1]), memory_bytes=int(sys.argv[2]))
