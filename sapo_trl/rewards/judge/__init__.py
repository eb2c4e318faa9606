"""
Decides whether an answer equals the gold answer, from the kinds of both values and from their numbers.

The judge is independent of math-verify, imports nothing from the rest of the package, and runs in a worker process.
"""

from __future__ import annotations

import re

from .comparison import equal
from .evaluation import TooLargeError
from .reading import plain_text, read
from .tokens import UnreadableError


# `5!` may be 5 with an exclamation mark, or 120.
_EXCLAIMED = re.compile(r"[0-9]+ ?!")


def judge(answer: str, gold: str) -> str:
    """`"equal"`, `"different"`, or `"unparsed"` if the answer or the gold has no reading or several."""
    if _EXCLAIMED.fullmatch(answer) and answer != gold:
        return "unparsed"
    if (plain := plain_text(answer)) and plain == plain_text(gold):
        return "equal"
    try:
        return "equal" if equal(read(answer), read(gold)) else "different"
    except (UnreadableError, TooLargeError, RecursionError):
        return "unparsed"
