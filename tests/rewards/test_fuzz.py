"""Answers that nobody would write: none may hang, crash or leak a process, and none is right by accident."""

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sapo_trl.rewards import equivalence
from sapo_trl.rewards.equivalence import Verdict, are_equivalent, configure_scoring, is_equivalent, scoring_counts


ATOMS = st.one_of(
    st.sampled_from(
        ["", "0", "1", "-3", "x", "1e999", ".5", r"\pi", r"\infty", "i", "°", "\x00", "\ud800", "\u202e", "９"]
    ),
    st.integers(-(10**40), 10**40).map(str),
    st.text(max_size=6),
)
COMMANDS = [
    r"\frac",
    r"\sqrt",
    r"\sin",
    r"\log",
    r"\int",
    r"\sum",
    r"\lim",
    r"\text",
    r"\left(",
    r"\right]",
    r"\begin{matrix}",
    r"\end{matrix}",
    r"\underbrace",
    r"\overline",
    r"\binom",
    r"\boxed",
    r"\\",
    "&",
    "$",
    "%",
    "{",
    "}",
    "^",
    "_",
    "!",
    "=",
    "<",
    ",",
    r"\cup",
    r"\in",
    r"\pm",
    r"\cdot",
    r"\foo",
    "|",
]
LATEX = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda parts: rf"\frac{{{parts[0]}}}{{{parts[1]}}}"),
        st.tuples(inner, inner).map(lambda parts: f"{parts[0]}^{{{parts[1]}}}"),
        inner.map(lambda part: rf"\sqrt{{{part}}}"),
        inner.map(lambda part: rf"\left({part}, {part}\right)"),
        st.lists(st.one_of(inner, st.sampled_from(COMMANDS)), max_size=6).map("".join),
    ),
    max_leaves=8,
)
# What takes long for sure, so there is one of it among others: each costs its time and a new process.
BOMBS = st.one_of(
    st.integers(10, 900).map(lambda depth: "{" * depth + "1" + "}" * depth),
    st.integers(10, 300).map(lambda depth: "2^{" * depth + "2" + "}" * depth),
    st.integers(10**5, 10**40).map(lambda number: f"{number}!"),
    st.integers(10**9, 10**40).map(lambda number: rf"\sqrt{{7^{{{number}}}}}"),
    LATEX.map(lambda part: rf"((\sqrt{{{part}}})!)!"),
)
# Nothing that is generated equals this but by writing it.
GOLD = r"\sqrt{7919} + 104729"


@pytest.fixture(scope="module", autouse=True)
def small_limit():
    configure_scoring(timeout=0.3)
    yield
    configure_scoring()


def check(answers: list[str]) -> None:
    others = child_ids() - set(equivalence._pool.processes())
    counts = scoring_counts()
    verdicts = are_equivalent(answers, [GOLD] * len(answers))
    assert Verdict.EQUAL not in verdicts
    assert sum(scoring_counts().values()) - sum(counts.values()) == len(answers)
    assert child_ids() - others == set(equivalence._pool.processes())
    # And a right answer is right.
    assert is_equivalent(r"104729+\sqrt{7919}", GOLD)


def child_ids() -> set[int]:
    """Processes below this one, zombies included."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


FUZZ = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@given(st.lists(LATEX, min_size=24, max_size=24, unique=True), BOMBS)
@settings(max_examples=2, **FUZZ)
def test_fifty_answers(answers, bomb):
    check([*answers, bomb])


@pytest.mark.slow
@given(st.lists(LATEX, min_size=24, max_size=24, unique=True), BOMBS)
@settings(max_examples=40, **FUZZ)
def test_a_thousand_answers(answers, bomb):
    check([*answers, bomb])
