"""Whether two LaTeX answers are the same as mathematics."""

import re
import threading

from . import math_verify_worker


# Past this length Python refuses to read a number, and no answer is meant.
_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")


def is_equivalent(answer: str, gold: str) -> bool:
    r"""
    Whether `answer` and `gold`, both LaTeX without `$`, are equal: as text, as integers, or for math-verify.

    The first two need no parser, and neither can be wrong: equal texts are equal, and two integers are equal or not.
    """
    answer, gold = answer.strip(), gold.strip()
    if not answer or not gold:
        return False
    if answer == gold:
        return True
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return int(answer) == int(gold)
    # math-verify limits its time by a signal, which only a main thread can receive. Without a limit an answer such as
    # 9^{9^{9^9}} would run for ever, so any other thread asks a process that has a main thread of its own.
    if threading.current_thread() is threading.main_thread():
        return math_verify_worker.compare(answer, gold)
    return math_verify_worker.compare_in_process(answer, gold)
