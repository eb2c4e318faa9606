"""
Whether an answer is the gold answer, decided on what kind of value each of both is and on numbers.

It is independent of math-verify, imports nothing of the rest of the package, and runs in a worker process.
"""

from __future__ import annotations

import re

from .comparison import equal
from .evaluation import TooLargeError
from .reading import plain_text, read
from .tokens import UnreadableError


# 5 with an exclamation mark, or 120.
_EXCLAIMED = re.compile(r"[0-9]+ ?!")


def judge(answer: str, gold: str) -> str:
    """`"equal"`, `"different"`, or `"unparsed"` if one of the two has no reading, or more than one."""
    if _EXCLAIMED.fullmatch(answer) and answer != gold:
        return "unparsed"
    if (plain := plain_text(answer)) and plain == plain_text(gold):
        return "equal"
    try:
        return "equal" if equal(read(answer), read(gold)) else "different"
    except (UnreadableError, TooLargeError, RecursionError):
        return "unparsed"
