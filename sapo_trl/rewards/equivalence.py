"""Decides whether two answers are equal as mathematics."""

from __future__ import annotations

import atexit
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache

from .judge.comparison import same_word
from .notation import as_latex, gold_as_latex, without_spaces
from .worker_pool import WorkerPool


MAX_LENGTH = 2000
"""Largest number of characters in an answer. A longer text is not meant as an answer, and is not parsed."""

# Python refuses to read very long integers. Such an integer is not meant as an answer.
_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})")
_WORDS = re.compile(r"(?:\\(?:text|textbf|textit|mathrm|mathbf)\{([A-Za-z ]+)\}|([A-Za-z ]+))")

# A decimal with few places stands only for itself, not for a rounded number.
_FEW_PLACES = re.compile(r"[+-]?[0-9]*\.?[0-9]{0,5}")


class Verdict(StrEnum):
    """The result of a comparison."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNPARSED = "unparsed"
    """The texts differ, and the answer or the gold is empty, too long, or has no reading or several."""
    TIMED_OUT = "timed_out"
    """The comparison took too long, or killed its process."""


_pool = WorkerPool()
_counts: Counter[Verdict] = Counter()
_counts_lock = threading.Lock()


def is_equivalent(answer: str | int | float, gold: str | int | float) -> bool:
    r"""
    Whether an answer equals the gold answer as mathematics.

    Args:
        answer (`str`): LaTeX or plain text, with or without `$` or a box.
        gold (`str`, `int` or `float`): the right answer, in one of the same forms.

    Returns:
        `bool`: `False` also if [`are_equivalent`] says `UNPARSED` or `TIMED_OUT`.

    Example:

    ```python
    >>> from sapo_trl.rewards.equivalence import is_equivalent

    >>> is_equivalent(r"\frac{12}{2}\sqrt{3}", r"6 \sqrt { 3 }"), is_equivalent("3", r"6 \sqrt { 3 }")
    (True, False)
    ```
    """
    return are_equivalent([answer], [gold])[0] is Verdict.EQUAL


def are_equivalent(answers: Sequence[str | int | float], golds: Sequence[str | int | float]) -> list[Verdict]:
    """
    Compare answers with gold answers, pair by pair, several pairs at a time.

    Equal texts, words and plain numbers are compared in this process. All other pairs are sent to worker processes,
    with hard limits of time and memory for each comparison, see [`configure_scoring`]. Repeated pairs are compared
    once. The function works in any thread, in an event loop (which waits), and in forked processes.

    Args:
        answers (`Sequence[str]`): LaTeX or plain text, with or without `$` or a box.
        golds (`Sequence[str | int | float]`): the right answers, one for each answer.

    Returns:
        `list[Verdict]`: one per pair.

    Raises:
        ValueError: if the numbers of answers and golds differ, or a number is not finite.
        TypeError: if an answer or a gold is neither text nor number.
        RuntimeError: if no worker process can be started.
    """
    if len(answers) != len(golds):
        raise ValueError(f"{len(answers)} answers came with {len(golds)} gold answers; one each is needed.")
    pairs = [
        (_readable(answer, as_latex), _readable(gold, gold_as_latex))
        for answer, gold in zip(answers, golds, strict=True)
    ]
    found = {pair: _at_sight(*pair) for pair in pairs}
    hard = [pair for pair, verdict in found.items() if verdict is None]
    if len(hard) == 1:
        found[hard[0]] = _compared(*hard[0])
    elif hard:
        with ThreadPoolExecutor(_pool.num_workers) as threads:  # they only wait for the processes
            found.update(zip(hard, threads.map(_compared, *zip(*hard, strict=True)), strict=True))
    verdicts = [found[pair] for pair in pairs]
    with _counts_lock:
        _counts.update(verdicts)
    return verdicts


def scoring_counts() -> dict[Verdict, int]:
    """The number of answers with each verdict in this process so far."""
    with _counts_lock:
        return {verdict: _counts[verdict] for verdict in Verdict}


def configure_scoring(num_workers: int = 2, timeout: float = 5.0, memory_bytes: int = 2 << 30) -> None:
    """
    Change the limits of comparisons in this process, and forget earlier comparisons.

    Args:
        num_workers (`int`, *optional*, defaults to `2`):
            Largest number of worker processes, some 30 MB each.
        timeout (`float`, *optional*, defaults to `5.0`):
            Seconds of computing for one comparison.
        memory_bytes (`int`, *optional*, defaults to `2 << 30`):
            Address space of a worker.
    """
    global _pool
    old, _pool = _pool, WorkerPool(num_workers, timeout, memory_bytes)
    old.close()
    _compared.cache_clear()


def _readable(value: str | int | float, convert: Callable[[str | int | float], str]) -> str:
    if isinstance(value, str) and len(value) > MAX_LENGTH:
        return value
    return convert(value)


def _at_sight(answer: str, gold: str) -> Verdict | None:
    """The verdict where no parser is needed for it, else `None`."""
    if not answer or not gold:
        return Verdict.UNPARSED
    if answer == gold:
        return Verdict.EQUAL
    if len(answer) > MAX_LENGTH or len(gold) > MAX_LENGTH:
        return Verdict.UNPARSED
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return Verdict.EQUAL if int(answer) == int(gold) else Verdict.DIFFERENT
    if _DECIMAL.fullmatch(answer) and _DECIMAL.fullmatch(gold):
        a, b = Fraction(answer), Fraction(gold)
        if a == b:
            return Verdict.EQUAL
        if _FEW_PLACES.fullmatch(answer) and _FEW_PLACES.fullmatch(gold):
            return Verdict.DIFFERENT
    if without_spaces(answer) == without_spaces(gold):
        return Verdict.EQUAL
    words, gold_words = _WORDS.fullmatch(answer), _WORDS.fullmatch(gold)
    if words and gold_words and same_word(_unwrapped(words), _unwrapped(gold_words)):
        return Verdict.EQUAL
    return None


def _unwrapped(words: re.Match) -> str:
    return (words[1] or words[2]).strip()


# Responses to one prompt repeat each other. Timeouts are cached, too: the same comparison would hang again.
@lru_cache(maxsize=16_384)
def _compared(answer: str, gold: str) -> Verdict:
    verdict = _pool.compare(answer, gold)
    return Verdict.TIMED_OUT if verdict is None else Verdict(verdict)


def _close_pool() -> None:
    _pool.close()


def _after_fork_in_child() -> None:
    # The child does not have the parent's other threads, and these threads may hold locks.
    global _pool, _counts_lock
    _pool.forget()
    _pool = WorkerPool(_pool.num_workers, _pool.timeout, _pool.memory_bytes)
    _counts_lock = threading.Lock()


atexit.register(_close_pool)
os.register_at_fork(after_in_child=_after_fork_in_child)
