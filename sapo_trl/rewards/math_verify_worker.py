"""math-verify in this process, or in a helper process for threads that cannot have its time limit.

This file is also the helper's program (see the end), so it imports nothing of this package.
"""

import atexit
import json
import subprocess
import sys
import threading


_lock = threading.Lock()
_process: subprocess.Popen | None = None


def compare(answer: str, gold: str) -> bool:
    """Ask math-verify; main thread only. A comparison that runs out of time (5 s a step) counts as unequal."""
    from math_verify import parse, verify  # half a second, which plain integers need not wait for

    # Written as $...$: bare LaTeX is searched for an expression instead, and `6 \sqrt { 3 }` is read as 3.
    return verify(parse(f"${gold}$"), parse(f"${answer}$"))


def compare_in_process(answer: str, gold: str) -> bool:
    """[`compare`] from any thread, by a helper process that is started on first use and then kept."""
    global _process
    with _lock:
        if _process is None or _process.poll() is not None:
            # A program of its own, not `multiprocessing`: that would import the user's main module once more.
            # -P keeps this folder, with its `format.py`, off the helper's import path.
            _process = subprocess.Popen(
                [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            atexit.register(_process.kill)
        _process.stdin.write(json.dumps([answer, gold]) + "\n")
        _process.stdin.flush()
        reply = _process.stdout.readline()
    if not reply:
        raise RuntimeError(f"The math-verify helper process died while it compared {answer!r} with {gold!r}.")
    return json.loads(reply)


if __name__ == "__main__":
    for request in sys.stdin:
        print(json.dumps(compare(*json.loads(request))), flush=True)
