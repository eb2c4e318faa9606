"""Which number an answer is: notations and units, generated."""

import math
import time
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sapo_trl.rewards
from sapo_trl.rewards import numeric_reward
from sapo_trl.rewards.numbers import is_close, read_number, read_numbers


def score(box: str, gold: object, **kwargs) -> float | None:
    return numeric_reward(completions=[rf"So \boxed{{{box}}}."], answer=[gold], **kwargs)[0]


WRAPPERS = [
    "{}",
    " {} ",
    "${}$",
    r"\({}\)",
    r"\left({}\right)",
    "({})",
    "{{{}}}",
    "**{}**",
    r"\boxed{{{}}}",
    r"\text{{{}}}",
    r"\mathbf{{{}}}",
    r"\color{{red}}{{{}}}",
    r"\displaystyle {}",
    "x = {}",
    "AB = {}",
    "f(2) = {}",
    r"m\angle ABC = {}",
    "≈ {}",
    r"x \approx {}",
    "about {}",
    "The answer is {}",
    "{}.",
    "{}。",
]
UNITS = [
    " cm",
    "cm",
    r"\text{ cm}^2",
    r"\,\mathrm{m/s^2}",
    " m·s⁻²",
    " kg m^{-3}",
    " N·m",
    r"\ \text{km/h}",
    " metres per second",
    " square feet",
    " sq. units",
    " cubic cm",
    "°",
    r"^\circ",
    "^{\\circ}\\mathrm{C}",
    " ℃",
    " degrees Celsius",
    r"\,\Omega",
    r"\,\mu\text{m}",
    " minutes",
    " years old",
    " apples",
    " ways",
    " people",
    " ₹",
    " €",
    " dollars per hour",
    " USD",
    " 厘米",
    "个",
    " J/(kg K)",
    r"\,\frac{m}{s^2}",
]
# What stands beside a number and makes it another, several, or none.
TAKEN_BACK = [
    "> {}",
    "x >= {}",
    r"x \le {}",
    "≥ {}",
    "x != {}",
    r"\neq {}",
    "not {}",
    "± {}",
    r"{} \pm 1",
    "at least {}",
    "{} or more",
    "{}+",
    "{} or 98",
    "{} and 98",
    "{}, 98",
    "{}; 98",
    "{} to 98",
    "{}–98",
    "{}...",
    "({}, 98)",
    r"\{{{}, 98\}}",
    "98 = {}",
    "{} = 98",
    "x = 98 or x = {}",
    "2x = {}",
    "x^2 = {}",
    "{}:98",
    "{}:30",
    "{} am",
    "{}/5/2020",
    "{} May",
    "{}th",
    "{} out of 98",
    "{} hours 30 minutes",
    "{} ft 6 in",
    "{}'6\"",
    "{} is wrong",
    r"{}\text{{ is wrong}}",
    "{}!",
    "{} factorial",
    "{} squared",
    "{}..",
    "~~{}~~",
    "|x| = {}",
    r"x \not= {}",
    "{}{{98}}",
    "{} plus or minus",
    "{} minus x",
    "{} sin x",
    "{} cos",
    r"{}\log 2",
    "{} mod 7",
    "{}_8",
    "{} base 8",
    "{}%%",
    "{} halves",
    "{} and a half",
    "{} times 98",
    "half of {}",
    "{} if x > 0",
    "{} i",
    r"{}\theta",
    r"{}\infty",
    r"{}\sqrt{{x}}",
    r"{}\frac{{x}}{{2}}",
    "{} (98)",
    "{} about 98",
    "{}€500",
    "{} USD 98",
    "{} cm + 98 cm",
]
# Factors that a notation multiplies a number with.
FACTORS = [
    ("{} hundred", 100),
    ("{} thousand", 1000),
    ("{} million", 10**6),
    (r"{}\text{{ million}}", 10**6),
    (r"\${} million", 10**6),
    ("{} million people", 10**6),
    ("{} billion", 10**9),
    ("{} dozen", 12),
    ("{} lakh", 10**5),
    ("{}万", 10**4),
    ("{}亿", 10**8),
    ("{}×10³", 1000),
    (r"{} \times 10^{{-3}}", 0.001),
    ("{} x 10^4", 10**4),
    ("{}e2", 100),
    ("{}‰", 0.001),
    ("{}π", math.pi),
    ("{} pi", math.pi),
    (r"{}\pi", math.pi),
    ("{}√2", math.sqrt(2)),
    ("{}sqrt(2)", math.sqrt(2)),
    (r"{}\sqrt[3]{{8}}", 2),
    ("-{}", -1),
    ("−{}", -1),
    ("minus {}", -1),
    ("negative {}", -1),
    ("{}/7", 1 / 7),
    (r"\frac{{{}}}{{7}}", 1 / 7),
]

integers = st.integers(2, 10**7)
decimals = st.builds(
    lambda digits, places: str(Decimal(digits).scaleb(-places)), st.integers(11, 10**6), st.integers(0, 3)
)


@given(number=decimals, wrapper=st.sampled_from(WRAPPERS), unit=st.sampled_from(["", *UNITS]))
def test_every_rendering_is_the_number(number, wrapper, unit):
    assert score(wrapper.format(number + unit), number) == 1.0


@given(number=decimals, other=decimals, wrapper=st.sampled_from(WRAPPERS), unit=st.sampled_from(["", *UNITS]))
def test_no_rendering_is_another_number(number, other, wrapper, unit):
    assume(not math.isclose(float(number), float(other), rel_tol=2e-4))
    assert score(wrapper.format(other + unit), number) == 0.0


@given(number=integers, taken_back=st.sampled_from(TAKEN_BACK))
def test_comparisons_lists_and_words_are_not_the_number(number, taken_back):
    assume(number != 98)
    assert score(taken_back.format(number), number) == 0.0


@given(number=integers, factor=st.sampled_from(FACTORS))
def test_factors(number, factor):
    text, value = factor[0].format(number), number * factor[1]
    assert score(text, repr(value), rel_tol=1e-9) == 1.0
    assert score(text, number) == 0.0


@given(
    number=integers, unknowns=st.from_regex("[abdfpqrtuvwxyz]{1,3}", fullmatch=True), space=st.sampled_from(["", " "])
)
def test_products_of_unknowns_are_no_units(number, unknowns, space):
    assume(unknowns not in ("ft", "yd", "yr"))
    assert read_number(f"{number}{space}{unknowns}") is None


@given(number=integers, letter=st.sampled_from("mgshLNJKVAWCFT"))
def test_a_letter_that_touches_its_number_may_be_an_unknown(number, letter):
    assert read_number(f"{number}{letter}") is None
    assert read_number(f"{number} {letter}") == read_number(rf"{number}\mathrm{{{letter}}}") == number


@given(
    number=st.integers(1000, 10**9),
    separator=st.sampled_from([",", "{,}", r"\,", r"\;", "~", "'", "\u00a0", "\u2009", " "]),
)
def test_thousands(number, separator):
    assert read_number(f"{number:,}".replace(",", separator)) == number


@given(number=decimals)
def test_full_width(number):
    wide = "".join(chr(ord(character) + 0xFEE0) for character in f"-{number}")
    assert read_number(wide) == -float(number)


@given(whole=st.integers(1, 99), top=st.integers(1, 98), bottom=st.integers(2, 99))
def test_mixed_numbers(whole, top, bottom):
    assume(top < bottom)
    value = float(whole + Fraction(top, bottom))
    for text in (
        rf"{whole}\frac{{{top}}}{{{bottom}}}",
        f"{whole} {top}/{bottom}",
        rf"{whole}\,\tfrac{{{top}}}{{{bottom}}}",
    ):
        assert read_number(text) == pytest.approx(value)
        assert read_number(f"-{text}") == pytest.approx(-value)
        assert read_number(text.replace(str(top), str(top + bottom), 1)) != whole * (top + bottom) / bottom


@pytest.mark.parametrize(
    ("text", "number"),
    [("½", 0.5), ("2½", 2.5), ("-2½", -2.5), ("⅓", 1 / 3), ("1⅞", 1.875), ("2³", 8), ("10⁻²", 0.01), ("2²", 4)]
    + [(r"0.\overline{3}", 1 / 3), (r"0.1\overline{6}", 1 / 6), (r"\sqrt[3]{8}", 2), ("∛27", 3), ("8^{1/3}", 2)]
    + [(r"\frac{\sqrt{5}-1}{2}", (5**0.5 - 1) / 2), (r"1+\sqrt{2}", 1 + 2**0.5), ("(3/4)π", 0.75 * math.pi)]
    + [("2 + 3 = 5", 5), ("x = 10/2 = 5", 5), ("x = 5/3 = 1.67", 1.67), ("5 = x", 5), ("AB = BC = 5", 5)]
    # two readings
    + [("1/2π", None), (r"1/2\sqrt{3}", None), ("12 - 13", None), ("12 + 13", None), ("1/2/3", None), ("2^3^2", None)]
    + [
        (r"2\frac{3}{2}", None),
        ("12 x 10", None),
        ("1.234.567", None),
        ("0,123", None),
        ("5(6)", None),
        (r"\{5\}", None),
    ]
    + [("12 = x = 13", None), ("-x = 5", None), ("x/2 = 5", None), (r"\sqrt{x} = 5", None), ("x = 5, y = 6", None)],
)
def test_table(text, number):
    assert read_number(text) == (None if number is None else pytest.approx(number, rel=1e-12))


@given(number=st.decimals(0, 10**6, places=4), places=st.integers(0, 3))
def test_rounding_at_school(number, places):
    rounded = number.quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP)
    assert is_close(str(rounded), str(number), precision=places)
    further = rounded + Decimal(2).scaleb(-places)
    assert not is_close(str(further), str(number), precision=places)


@settings(max_examples=25)
@given(number=st.integers(2, 500), factor=st.integers(2, 9))
def test_units_on_both_sides(number, factor):
    for unit, smaller, size in (("m", "cm", 100), ("hours", "minutes", 60), ("km^2", "m^2", 10**6)):
        gold = f"{number} {unit}"
        assert score(f"{number * size} {smaller}", gold) == score(str(number), gold) == 1.0
        assert score(f"{number} {smaller}", gold) == score(f"{number * factor} {unit}", gold) == 0.0
    for unit, other in (
        ("cm", "kg"),
        ("apples", "oranges"),
        ("cm", "cm^2"),
        ("km/h", "km"),
        ("°C", "°F"),
        ("dollars", "cm"),
    ):
        assert score(f"{number} {other}", f"{number} {unit}") == 0.0
        assert score(f"{number} {unit}", f"{number} {unit}") == 1.0


@pytest.mark.parametrize(("symbol", "name"), [("$", "dollars"), (r"\$", "dollars"), ("€", "euros"), ("₹", "rupees")])
def test_currencies_are_units(symbol, name):
    gold = f"{symbol}12"
    for answer in (gold, "12", f"12 {name}", "$12$"):
        assert score(answer, gold) == 1.0
    for answer in ("£12", "12 km", "12 cents", f"{symbol}13"):
        assert score(answer, gold) == 0.0
    assert score("1200 cents", r"\$12") == 1.0


@given(tenths=st.integers(1, 990))
def test_a_percentage_up_to_one_is_a_share_alone(tenths):
    number = f"{tenths / 10:g}"
    assert score(f"{number}%", number) == score(number, f"{number}%") == float(tenths > 10)
    assert score(f"{tenths / 1000:.4f}", f"{number}%") == 1.0


def test_rounding_keeps_to_one_rule_for_both():
    assert is_close("2.68", "2.675", precision=2) and is_close("1.2", "1.25", precision=1)
    assert not is_close("1.15", "1.25", precision=1)  # 1.2 and 1.3 at school, 1.1 and 1.2 in Python
    assert is_close("1e300", "1e300", precision=300)


@pytest.mark.parametrize("text", ["[1, 2)", "(1, 2]", "[1, 2", "1, 2]", "{1, 2]"])
def test_lists_in_brackets_that_do_not_pair(text):
    assert read_numbers(text) is None


@pytest.mark.parametrize("gold", ["x", "nan", "inf", "10:30", float("nan"), ""])
def test_a_gold_that_is_no_number(gold):
    with pytest.raises(ValueError, match="`answer` must be a number for `numeric_reward`, got"):
        score("10", gold)


@pytest.mark.parametrize("name", ["accuracy_reward", "geo3k_reward", "multiple_choice_reward", "numeric_reward"])
def test_every_reward_skips_rows_without_an_answer(name):
    reward = getattr(sapo_trl.rewards, name)
    gold = "A" if name == "multiple_choice_reward" else "4"
    completions = [rf"<think>.</think>\boxed{{{gold}}}", rf"\boxed{{{gold}}}", "None"]
    assert reward(completions=completions, answer=[gold, None, None]) == [1.0, None, None]


def test_thinking_is_not_read():
    assert numeric_reward(completions=[r"<think>\boxed{4}", r"<think>\boxed{3}</think>\boxed{4}"], answer=[4, 4]) == [
        0,
        1,
    ]


@pytest.mark.parametrize(
    "piece", ["9", "9,", "1 ", "(", "{", r"\frac", r"\sqrt", "^", "_{a}", "f(2) ", "m/", "per ", "-", "= "]
)
@pytest.mark.parametrize("start", ["", "5 ", "x = "])
def test_hostile_answers_take_no_time(piece, start):
    longest_that_is_read, long = (start + piece * 200)[:200], start + piece * 20_000
    started = time.process_time()
    assert read_number(longest_that_is_read) is None or piece in ("9", "(", "{")
    assert numeric_reward(completions=[rf"\boxed{{{long}}}"], answer=["5"]) == [0.0]
    assert time.process_time() - started < 0.5
