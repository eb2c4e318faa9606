r"""
Our scorer, `mathruler` (what EasyR1 and the official recipe use) and TRL's `accuracy_reward`, on generated pairs whose
truth is known because each is made of one value, or two, in two notations. Golds are in `$...$` for TRL.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction

import pytest
from trl.rewards import accuracy_reward as trl_accuracy_reward

from sapo_trl.rewards import accuracy_reward


grade_answer = pytest.importorskip("mathruler.grader").grade_answer

PAIRS_OF_A_KIND = 8

Make = Callable[[random.Random], tuple]
"""Draws a value: whatever the two notations take as arguments."""


def frac(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def integer(r: random.Random) -> tuple:
    return (r.randint(-400, 400),)


def thousands(r: random.Random) -> tuple:
    return (r.randint(1_000, 9_999_999),)


def hundredths(r: random.Random) -> tuple:
    return (Fraction(r.randint(1, 9_999) * 4 + 1, 100),)


def fraction(r: random.Random) -> tuple:
    denominator = r.choice([2, 3, 5, 7, 11, 13])
    return (Fraction(r.randint(1, 9) * denominator + r.randint(1, denominator - 1), denominator),)


def quarter(r: random.Random) -> tuple:
    return (Fraction(2 * r.randint(1, 40) + 1, 4),)


def surd(r: random.Random) -> tuple:
    return r.randint(2, 12), r.choice([2, 3, 5, 7, 11, 13])


def two_numbers(r: random.Random) -> tuple:
    low = r.randint(-9, 9)
    return low, low + r.randint(1, 9)


def power(r: random.Random) -> tuple:
    return r.randint(2, 9), r.randint(2, 5)


def digits(r: random.Random) -> tuple:
    return r.randint(11, 99), r.randint(2, 6)


def word(r: random.Random) -> tuple:
    return (r.choice(["yes", "no", "east", "west", "rhombus", "isosceles", "similar", "never"]),)


# Name, what is drawn, answer and gold of it.
KINDS: list[tuple[str, Make, Callable[..., str], Callable[..., str]]] = [
    ("integer", integer, lambda n: str(n), lambda n: str(n)),
    ("integer in a sentence's end", integer, lambda n: f"{n}.", lambda n: str(n)),
    ("thousands, comma", thousands, lambda n: f"{n:,}", lambda n: str(n)),
    ("thousands, thin space", thousands, lambda n: f"{n:,}".replace(",", r"\,"), lambda n: str(n)),
    ("decimal, trailing zero", hundredths, lambda x: f"{float(x):.3f}", lambda x: f"{float(x):.2f}"),
    ("fraction, slash", fraction, lambda x: f"{x.numerator}/{x.denominator}", frac),
    ("fraction, dfrac", fraction, lambda x: frac(x).replace("frac", "dfrac"), frac),
    (
        "fraction, without braces",
        lambda r: (r.randint(1, 4), r.randint(5, 9)),
        r"\frac{}{}".format,
        r"\frac{{{}}}{{{}}}".format,
    ),
    ("fraction, not reduced", fraction, lambda x: rf"\frac{{{2 * x.numerator}}}{{{2 * x.denominator}}}", frac),
    ("fraction and decimal", quarter, lambda x: f"{float(x):g}", frac),
    ("mixed number", fraction, lambda x: str(int(x)) + frac(x - int(x)), frac),
    ("mixed number, plain", fraction, lambda x: f"{int(x)} {x - int(x)}", frac),
    ("surd, geometry3k's spaces", surd, r"{}\sqrt{{{}}}".format, r"{} \sqrt {{ {} }}".format),
    ("surd, under the root", surd, lambda a, b: rf"\sqrt{{{a * a * b}}}", r"{}\sqrt{{{}}}".format),
    (
        "surd, rationalised",
        surd,
        lambda a, b: rf"\frac{{{a}\sqrt{{{b}}}}}{{{b}}}",
        r"\frac{{{}}}{{\sqrt{{{}}}}}".format,
    ),
    ("surd, sign √", surd, "{}√{}".format, r"{}\sqrt{{{}}}".format),
    ("multiple of pi", integer, lambda n: rf"{n} \pi", lambda n: rf"\pi \cdot {n}" if n >= 0 else rf"-\pi \cdot {-n}"),
    (
        "fraction of pi",
        fraction,
        lambda x: rf"\frac{{{x.numerator}\pi}}{{{x.denominator}}}",
        lambda x: frac(x) + r"\pi",
    ),
    ("degrees", integer, lambda n: rf"{n}^\circ", lambda n: str(n)),
    ("degrees, sign °", integer, lambda n: f"{n}°", lambda n: str(n)),
    ("unit", integer, lambda n: rf"{n}\text{{ cm}}", lambda n: str(n)),
    ("percent", integer, lambda n: rf"{n}\%", lambda n: str(n)),
    ("power", power, "{}^{}".format, lambda a, b: str(a**b)),
    ("power, braces", power, "{}^{{{}}}".format, lambda a, b: str(a**b)),
    ("scientific", digits, lambda a, b: rf"{a / 10} \times 10^{{{b}}}", lambda a, b: str(a * 10 ** (b - 1))),
    ("scientific, e", digits, lambda a, b: f"{a / 10}e{b}", lambda a, b: str(a * 10 ** (b - 1))),
    ("polynomial", two_numbers, lambda a, b: f"(x-({a}))(x-({b}))", lambda a, b: f"x^2+({-a - b})x+({a * b})"),
    (
        "sum",
        two_numbers,
        lambda a, b: f"{a} + {b}x".replace("+ -", "- "),
        lambda a, b: f"{b}x + {a}".replace("+ -", "- "),
    ),
    ("equation", integer, lambda n: f"x = {n}", lambda n: str(n)),
    ("interval", two_numbers, lambda a, b: rf"\left[{a},{b}\right)", "[{}, {})".format),
    (
        "union",
        two_numbers,
        lambda a, b: rf"({b},\infty) \cup (-\infty,{a})",
        lambda a, b: rf"(-\infty,{a}) \cup ({b},\infty)",
    ),
    ("pair", two_numbers, lambda a, b: rf"\left({a},{b}\right)", "({}, {})".format),
    ("set, other order", two_numbers, lambda a, b: rf"\{{{b}, {a}\}}", lambda a, b: rf"\{{{a}, {b}\}}"),
    ("word", word, lambda w: rf"\text{{{w}}}", lambda w: w),
]


def generated() -> list[tuple[str, str, str, bool]]:
    """(kind, answer, gold, whether they are equal), half of them equal; always the same."""
    pairs = []
    for kind, make, answer, gold in KINDS:
        r = random.Random(kind)
        for k in range(PAIRS_OF_A_KIND):
            right, given = make(r), None
            if k % 2 == 0:
                given = right
            else:
                while given is None or given == right:
                    given = make(r)
            pairs.append((kind, answer(*given), gold(*right), k % 2 == 0))
    return pairs


# For each kind in which a scorer is not always right: how many of the 4 right answers it misses, and how many of the 4
# wrong ones it takes. docs/rewards.md has the reasons.
OURS: dict[str, tuple[int, int]] = {}
MATHRULER = {
    "thousands, thin space": (4, 0),
    "fraction, not reduced": (4, 0),
    "surd, sign √": (4, 0),
    "degrees, sign °": (4, 0),
    "power": (4, 0),
    "power, braces": (4, 0),
    "scientific": (4, 0),
    "union": (4, 0),
    "set, other order": (4, 0),
}
TRL = {
    "integer in a sentence's end": (4, 0),
    "thousands, thin space": (4, 0),
    "fraction, without braces": (4, 0),
    "mixed number, plain": (4, 0),
    "surd, sign √": (4, 0),
    "degrees, sign °": (4, 0),
    "percent": (2, 0),
    "scientific": (1, 0),
    "scientific, e": (4, 0),
}


def errors(pairs: list[tuple[str, str, str, bool]], rewards: list[float]) -> dict[str, tuple[int, int]]:
    missed: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    for (kind, _, _, truth), reward in zip(pairs, rewards, strict=True):
        missed[kind] += truth and not reward
        taken[kind] += bool(reward) and not truth
    return {kind: (missed[kind], taken[kind]) for kind, *_ in KINDS if missed[kind] or taken[kind]}


@pytest.mark.slow
class TestAgreement:
    PAIRS = generated()

    def test_enough_of_each(self):
        assert len(self.PAIRS) >= 200 and len({pair[:3] for pair in self.PAIRS}) > 0.95 * len(self.PAIRS)
        per_kind = defaultdict(list)
        for kind, *_, truth in self.PAIRS:
            per_kind[kind].append(truth)
        assert all(sum(truths) == len(truths) / 2 for truths in per_kind.values())

    def test_ours(self):
        boxed = [rf"\boxed{{{answer}}}" for _, answer, _, _ in self.PAIRS]
        assert (
            errors(self.PAIRS, accuracy_reward(completions=boxed, answer=[gold for _, _, gold, _ in self.PAIRS]))
            == OURS
        )

    def test_mathruler(self):
        assert errors(self.PAIRS, [grade_answer(answer, gold) for _, answer, gold, _ in self.PAIRS]) == MATHRULER

    def test_trl(self):
        messages = [[{"role": "assistant", "content": rf"\boxed{{{answer}}}"}] for _, answer, _, _ in self.PAIRS]
        rewards = trl_accuracy_reward(messages, [f"${gold}$" for _, _, gold, _ in self.PAIRS])
        assert errors(self.PAIRS, rewards) == TRL
