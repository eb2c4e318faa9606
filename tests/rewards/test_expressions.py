r"""
Random expressions in random notations. A tree of the test's own is evaluated by the test's own arithmetic, so that the
truth is known: two notations of one tree are equal, two trees with other values are not.
"""

from __future__ import annotations

import cmath
import math
import random
from fractions import Fraction

import psutil
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sapo_trl.rewards import accuracy_reward, equivalence
from sapo_trl.rewards.judge import equal, judge, read
from sapo_trl.rewards.judge.evaluation import TooLargeError, evaluate
from sapo_trl.rewards.judge.expressions import parsed
from sapo_trl.rewards.judge.nodes import symbols
from sapo_trl.rewards.judge.tokens import UnreadableError, tokenized
from sapo_trl.rewards.notation import as_latex


MANY = settings(
    deadline=None, derandomize=True, database=None, max_examples=150, suppress_health_check=list(HealthCheck)
)

Tree = tuple

SYMBOLS = ("x", "y", "R", "r", r"\theta", "a_1")
LEAVES = st.one_of(
    st.integers(1, 12).map(lambda number: ("number", number)),
    st.sampled_from(SYMBOLS).map(lambda name: ("symbol", name)),
    st.sampled_from([("constant", "pi"), ("constant", "e")]),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["+", "-", "*", "/"]), inner, inner),
        st.tuples(st.just("^"), inner, st.sampled_from([("number", 2), ("number", 3), ("negative", ("number", 1))])),
        st.tuples(st.sampled_from(["negative", "sqrt", "sin", "ln"]), inner),
    ),
    max_leaves=6,
)
NUMERIC = TREES.filter(lambda tree: not names(tree))


def names(tree: Tree) -> set[str]:
    return {tree[1]} if tree[0] == "symbol" else set().union(*(names(x) for x in tree[1:] if isinstance(x, tuple)))


def value(tree: Tree, point: dict[str, float]) -> complex:
    """Raises ArithmeticError or ValueError where there is none."""
    kind, *parts = tree
    if kind == "number":
        return complex(parts[0])
    if kind == "symbol":
        return complex(point[parts[0]])
    if kind == "constant":
        return {"pi": math.pi, "e": math.e}[parts[0]] + 0j
    a, *rest = (value(part, point) for part in parts)
    if kind in ("sqrt", "sin", "ln"):
        return {"sqrt": cmath.sqrt, "sin": cmath.sin, "ln": cmath.log}[kind](a)
    if kind == "negative":
        return -a
    b = rest[0]
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b, "^": lambda: a**b}[kind]()


# Precedence, to know where brackets are needed.
LEVELS = {"+": 0, "-": 0, "negative": 0, "*": 1, "/": 1, "sin": 1, "ln": 1, "^": 2}


def render(tree: Tree, rng: random.Random, plain: bool = False) -> str:
    """One of many notations; `plain` is the text that a keyboard has."""

    def inner(part: Tree, level: int) -> str:
        text = render(part, rng, plain)
        negative_number = text.lstrip("( ").startswith("-")
        if LEVELS.get(part[0], 3) < level or (level and negative_number):
            return f"({text})" if plain or rng.random() < 0.5 else rf"\left( {text} \right)"
        return text

    kind, *parts = tree
    space = rng.choice(["", " "])
    if kind == "number":
        return rng.choice([str(parts[0]), str(parts[0]), f"{parts[0]}.0"])
    if kind == "symbol":
        return parts[0].replace("\\", "") if plain else rng.choice([parts[0], parts[0].replace(r"\theta", "θ")])
    if kind == "constant":
        if parts[0] == "e":
            return "e" if plain else rng.choice(["e", r"\mathrm{e}"])
        return "pi" if plain else rng.choice([r"\pi", "π"])
    if kind in ("+", "-"):
        left, right = inner(parts[0], 0), inner(parts[1], 1)
        return f"{left}{space}{kind}{space}{right}"
    if kind == "negative":
        return f"-{inner(parts[0], 1)}"
    if kind == "*":
        sign = "*" if plain else rng.choice([r"\cdot ", r"\times ", "×", "·", "*"])
        return f"{inner(parts[0], 1)}{space}{sign}{space}{inner(parts[1], 2)}"
    if kind == "/":
        if plain or rng.random() < 0.2:
            return f"{inner(parts[0], 1)}/{inner(parts[1], 3)}"
        above, below = render(parts[0], rng), render(parts[1], rng)
        return rf"\{rng.choice(['frac', 'dfrac', 'tfrac'])}{{{above}}}{space}{{{below}}}"
    if kind == "^":
        exponent = render(parts[1], rng, plain)
        if plain:
            return f"{inner(parts[0], 3)}{rng.choice(['^', '**'])}({exponent})"
        return f"{inner(parts[0], 3)}^{space}{{{exponent}}}"
    argument = render(parts[0], rng, plain)
    if kind == "sqrt":
        return f"sqrt({argument})" if plain else rf"\sqrt{space}{{{argument}}}"
    return f"{kind}({argument})" if plain else rf"\{kind}\left({argument}\right)"


def points(seed: int, *trees: Tree) -> list[dict[str, float]]:
    rng = random.Random(seed)
    found = sorted(set().union(*(names(tree) for tree in trees)))
    return [{name: rng.uniform(0.2, 4.0) for name in found} for _ in range(4)]


def values(tree: Tree, at: list[dict[str, float]]) -> list[complex]:
    """Values that floating point can be trusted with; none if there are such without."""
    try:
        found = [value(tree, point) for point in at]
    except (ArithmeticError, ValueError):
        return []
    return found if all(1e-6 < abs(x) < 1e9 and abs(x.imag) < 1e-12 * abs(x) for x in found) else []


@MANY
@given(TREES, st.integers(0, 10**6))
def test_two_notations_of_an_expression_are_equal(tree, seed):
    assume(values(tree, points(seed, tree)))
    rng = random.Random(seed)
    answer, gold = render(tree, rng, plain=seed % 3 == 0), render(tree, rng)
    assert judge(as_latex(answer), as_latex(gold)) == "equal"


@MANY
@given(TREES, TREES, st.integers(0, 10**6))
def test_no_notation_of_another_value_is_equal(tree, other, seed):
    at = points(seed, tree, other)
    ours, theirs = values(tree, at), values(other, at)
    assume(ours and theirs)
    assume(any(abs(x - y) > 1e-6 * abs(x) for x, y in zip(ours, theirs, strict=True)))
    rng = random.Random(seed)
    answer, gold = render(other, rng, plain=seed % 3 == 0), render(tree, rng)
    assert judge(as_latex(answer), as_latex(gold)) != "equal"


@MANY
@given(TREES, st.integers(0, 10**6), st.sampled_from([("+", 1), ("*", 2), ("negative",), ("^", 2), ("sqrt",)]))
def test_a_small_change_is_another_value(tree, seed, change):
    """The test above draws such pairs only by chance."""
    kind, *operand = change
    other = (kind, tree, *(("number", x) for x in operand))
    at = points(seed, tree)
    ours, theirs = values(tree, at), values(other, at)
    assume(ours and theirs and any(abs(x - y) > 1e-6 * abs(x) for x, y in zip(ours, theirs, strict=True)))
    rng = random.Random(seed)
    assert judge(as_latex(render(other, rng)), as_latex(render(tree, rng))) != "equal"


@settings(MANY, max_examples=50)
@given(TREES, st.sampled_from(["R", "r"]), st.integers(0, 10**6))
def test_an_unknown_in_the_other_case_is_another_one(tree, kept, seed):
    tree = ("+", tree, ("*", ("symbol", "R"), _renamed(tree, {"R": "r"})))
    assume({"R", "r"} <= names(tree))
    merged = _renamed(tree, {"R": kept, "r": kept})
    at = points(seed, tree)
    ours, theirs = values(tree, at), values(merged, at)
    assume(ours and theirs and any(abs(x - y) > 1e-6 * abs(x) for x, y in zip(ours, theirs, strict=True)))
    rng = random.Random(seed)
    assert judge(as_latex(render(merged, rng)), as_latex(render(tree, rng))) != "equal"


def _renamed(tree: Tree, new: dict[str, str]) -> Tree:
    if tree[0] == "symbol":
        return ("symbol", new.get(tree[1], tree[1]))
    return (tree[0], *(_renamed(part, new) if isinstance(part, tuple) else part for part in tree[1:]))


@settings(MANY, max_examples=40)
@given(TREES, TREES, st.integers(0, 10**6))
def test_equations_are_equal_up_to_a_factor(left, right, seed):
    at = points(seed, left, right)
    difference = values(("-", left, right), at)
    assume(difference and any(abs(x - difference[0]) > 1e-6 for x in difference))
    rng = random.Random(seed)
    gold = f"{render(left, rng)} = {render(right, rng)}"
    factor = ("number", rng.randint(2, 9))
    moved = f"{render(('-', right, left), rng)} = 0"
    assert judge(as_latex(moved), as_latex(gold)) == "equal"
    scaled = f"{render(('*', left, factor), rng)} = {render(('*', right, factor), rng)}"
    assert judge(as_latex(scaled), as_latex(gold)) == "equal"
    # Not a multiple of the first, as it is not constant.
    other = f"{render(left, rng)} = {render(('+', right, ('number', 1)), rng)}"
    assert judge(as_latex(other), as_latex(gold)) != "equal"


PIECES = st.sampled_from(
    r"""
    \frac \sqrt \text{ \text{cm} \left( \right) \overline \angle \begin{pmatrix} \end{pmatrix} \begin \cup \in \pm
    \cdot \pi \infty \circ \le \ne \% \$ \{ \} \\ \! { } ( ) [ ] ^ _ + - * / = < > , ; : . ' ! | & 0 1 2 12 007
    1e9 x X AB sin pi cm or and not million AM 0.3 ... \mathbb{R} \setminus \langle \rangle \mid \sin \log \binom
    ° ² ½ √ é 七
    """.split()
)
SOUP = st.lists(st.one_of(PIECES, st.just(" ")), max_size=14).map("".join)


@settings(MANY, max_examples=400)
@given(SOUP, SOUP)
def test_whatever_is_written_is_judged_and_both_ways_alike(answer, gold):
    """Without an exception; the worker would turn one into a wrong answer."""
    a, b = as_latex(answer), as_latex(gold)
    judge(a, b)
    try:
        x, y = read(a), read(b)
        assert equal(x, y) == equal(y, x)
    except (UnreadableError, TooLargeError):
        return


@settings(MANY, max_examples=150)
@given(SOUP)
def test_no_soup_equals_a_number_that_it_does_not_hold(soup):
    assert judge(as_latex(soup), "104729") != "equal"
    assert judge(as_latex(soup), r"\sqrt{7919}+x") != "equal"


@pytest.mark.slow
def test_math_verifys_parser_reads_the_same_values():
    """An independent parser, of expressions without what it reads otherwise: cases of letters, digits side by side."""
    from latex2sympy2_extended import latex2sympy

    checked = 0
    for seed in range(600):
        rng = random.Random(seed)
        tree = _random_tree(rng, 4)
        text = render(tree, rng)
        point = points(seed, tree)[0]
        latex = as_latex(text)
        node = parsed(tokenized(latex))
        if not values(tree, [point]):
            continue
        ours = complex(evaluate(node, {name: Fraction(x) for name, x in point.items()}))
        theirs = latex2sympy(latex)
        by_name = {str(symbol): symbol for symbol in theirs.free_symbols}
        substituted = {by_name[n.replace("\\", "")]: x for n, x in point.items() if n.replace("\\", "") in by_name}
        found = complex(theirs.evalf(subs=substituted))
        assert symbols(node) == names(tree)
        assert abs(found - ours) <= 1e-9 * abs(ours), text
        checked += 1
    assert checked > 200


def _random_tree(rng: random.Random, depth: int) -> Tree:
    if depth == 0 or rng.random() < 0.25:
        return rng.choice(
            [("number", rng.randint(1, 12)), ("symbol", rng.choice(["x", "y", "z"])), ("constant", "pi")]
        )
    kind = rng.choice(["+", "-", "*", "/", "^", "sqrt", "negative"])
    if kind in ("sqrt", "negative"):
        return (kind, _random_tree(rng, depth - 1))
    right = ("number", rng.choice([2, 3])) if kind == "^" else _random_tree(rng, depth - 1)
    return (kind, _random_tree(rng, depth - 1), right)


@pytest.mark.slow
def test_a_thousand_answers_take_less_than_five_seconds():
    """Right and wrong ones, and a tenth that is there to take long, all different."""
    hostile = [
        *(r"9^{9^{9^9}}", r"10^{10^{10}}!", "2^{2^{2^{2^{2^{2}}}}}", r"\binom{10^9}{10^8}", r"(x+1)^{1000000}"),
        *("{" * 900 + "1" + "}" * 900, "(" * 900 + "1" + ")" * 900, r"\text{" * 300 + "a" + "}" * 300),
        *("1+" * 900 + "1", "x!" * 190, r"\sin(" * 90 + "x" + ")" * 90, "9" * 1900, "1." + "3" * 1800 + "..."),
        *(r"\sqrt{7^{123456789123}}", "x^" * 190 + "x"),
    ]
    accuracy_reward(completions=[r"\boxed{1+1}", r"\boxed{1+2}"], answer=["2", "3"])
    completions, golds, due = [], [], []
    for k in range(1, 1001):
        kinds = [
            (rf"\frac{{{6 * k}}}{{{k}}}\sqrt{{3}}", r"6\sqrt{3}", 1.0),
            (rf"{k}\sqrt{{3}} + 1", r"6\sqrt{3}", 0.0),
            (rf"(x+{k})^2", rf"x^2+{2 * k}x+{k * k}", 1.0),
            (rf"\sin({k}x)", rf"{k}\sin x", 0.0),
            (rf"{k} \text{{ cm}}", str(k), 1.0),
            (rf"({k}, {k + 1})", rf"({k + 1}, {k})", 0.0),
            (rf"x < {k}", rf"(-\infty, {k})", 1.0),
            (rf"{2 * k}x = {k}y", "y = 2x", 1.0),
            (rf"{k}e-{k % 30}", rf"{k + 1} \times 10^{{-{k % 30}}}", 0.0),
            (f"{hostile[k % len(hostile)]} + {k}", "x + 7", 0.0),
        ]
        answer, gold, reward = kinds[k % len(kinds)]
        completions.append(rf"\boxed{{{answer}}}")
        golds.append(gold)
        due.append(reward)
    # Of computing, on both cores together: other programs' share of the machine is not counted.
    before = computed()
    assert accuracy_reward(completions=completions, answer=golds) == due
    assert computed() - before < 2 * 5.0
    assert {child.pid for child in psutil.Process().children()} == {*equivalence._pool.processes()}


def computed() -> float:
    """Seconds of computing of this process and its workers."""
    processes = [psutil.Process(), *(psutil.Process(pid) for pid in equivalence._pool.processes())]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


class TestCorners:
    """Expressions that are equal over the most of the line, or nearly equal, and not the same."""

    @settings(MANY, max_examples=40)
    @given(st.sampled_from("abkmnpqrtuvwxyz"), st.integers(1, 1000))
    def test_a_corner_far_away(self, letter, shift):
        for other in (
            f"|{letter}+{shift}|-{shift}",
            rf"\sqrt{{({letter}+{shift})^2}}-{shift}",
            rf"\max({letter}, -{shift})",
            rf"\min({letter}, {shift})",
        ):
            assert judge(as_latex(other), letter) != "equal"
        assert judge(as_latex(f"|-{letter}-{shift}|"), as_latex(f"|{letter}+{shift}|")) == "equal"
        # Two equations with the same solutions over the most of the line.
        assert judge(as_latex(f"|{letter}+{shift}|-{shift} = 2j"), as_latex(f"{letter} = 2j")) != "equal"

    @pytest.mark.parametrize("letter", "abkmnpqrtuvwxyz")
    def test_steps_at_whole_numbers(self, letter):
        def is_equal(answer: str, gold: str) -> bool:
            return judge(answer.replace("x", letter), gold.replace("x", letter)) == "equal"

        assert not is_equal(r"\lceil x \rceil - 1", r"\lfloor x \rfloor")
        assert not is_equal(r"\lfloor x \rfloor + 1", r"\lceil x \rceil")
        assert not is_equal(r"-\lfloor -x \rfloor - 1", r"\lfloor x \rfloor")
        assert is_equal(r"-\lceil -x \rceil", r"\lfloor x \rfloor")
        assert is_equal(r"\lfloor x + 1 \rfloor - 1", r"\lfloor x \rfloor")
        assert is_equal(r"\lfloor x\rfloor+\lfloor x+\frac12\rfloor", r"\lfloor 2x\rfloor")

    @pytest.mark.parametrize("exponent", [14, 20, 40, 100])
    def test_nearly_equal_numbers(self, exponent):
        tiny = rf"10^{{-{exponent}}}"
        for answer, gold in (
            (rf"\sin({tiny})", tiny),
            (rf"\cos({tiny})", "1"),
            (rf"\pi + {tiny}", r"\pi"),
            (rf"e^{{{tiny}}}", "1"),
            (rf"x + {tiny}", "x"),
            (rf"\sqrt{{2}}(1 + {tiny})", r"\sqrt{2}"),
        ):
            assert judge(answer, gold) != "equal"
            assert judge(answer, answer + "+0") == "equal"

    def test_almost_whole(self):
        assert judge(r"e^{\pi\sqrt{163}}", "640320^3+744") != "equal"
        assert judge(r"\tanh(40)", "1") != "equal"
