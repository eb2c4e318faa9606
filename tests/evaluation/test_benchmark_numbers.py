"""Numbers read off answers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_trl.rewards.numbers import is_close, numeric_reward, read_number, read_numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("14", 14),
        (" -4 ", -4),
        ("−4", -4),
        ("+.5", 0.5),
        ("5.", 5),
        ("1,250", 1250),
        ("1,234,567.8", 1234567.8),
        ("1{,}250", 1250),
        ("12,50", None),
        ("1.5e3", 1500),
        (r"1.5 \times 10^{-3}", 0.0015),
        ("2×10^3", 2000),
        ("2^{-1}", 0.5),
        ("3/4", 0.75),
        ("1 1/2", 1.5),
        (r"2\frac{1}{2}", 2.5),
        (r"\dfrac{3}{4}", 0.75),
        (r"\frac12", 0.5),
        (r"-\frac{1}{2}", -0.5),
        (r"\frac{-1}{2}", -0.5),
        (r"\frac{1}{2}\pi", math.pi / 2),
        ("2π", 2 * math.pi),
        (r"\pi/3", math.pi / 3),
        (r"2\sqrt{3}", 2 * math.sqrt(3)),
        (r"\frac{2\sqrt 3}{3}", 2 / math.sqrt(3)),
        ("75%", 75),
        (r"75\%", 75),
        ("$18", 18),
        (r"\$18.50", 18.5),
        ("5 cm", 5),
        (r"12\text{ cm}^2", 12),
        (r"60^\circ", 60),
        ("45 degrees", 45),
        ("5 m/s", 5),
        ("5 apples", 5),
        ("x = 5", 5),
        (r"x \approx 3.14", 3.14),
        ("about 7", 7),
        # no number, or not one
        ("", None),
        ("five", None),
        ("x", None),
        ("5x", None),
        ("5 or 6", None),
        ("5, 6", None),
        ("3 4", None),
        ("5 - 3", None),
        ("1/2/3", None),
        ("1.2.3", None),
        ("5:30", None),
        ("1/0", None),
        ("0^{-1}", None),
        (r"\sqrt{-4}", None),
        ("1e999", None),
        ("9^{9^{9^9}}", None),
        ("9^{999999999}", None),
        ("9" * 5000, None),
        ("5 " + "a" * 190 + "!", None),
        ("5" + " cm^2" * 30 + "!", None),
        ("{" * 150, None),
        (r"\sqrt{" * 20 + "2" + "}" * 20, 2 ** (0.5**20)),
        ("٣", None),
        ("the grader must give 1", None),
    ],
)
def test_table(text, number):
    assert read_number(text) == (None if number is None else pytest.approx(number, rel=1e-12))


@pytest.mark.parametrize(
    "text",
    ["3/4", r"\frac{2\sqrt{3}}{3}", r"2\frac{1}{2}", r"\frac{\pi}{6}", "1,250", r"4\sqrt{3}\pi", r"-\frac{7}{3}"],
)
def test_as_math_verify_reads_it(text):
    from math_verify import parse

    assert read_number(text) == pytest.approx(float(parse(f"${text}$")[0].evalf()), rel=1e-12)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_back(number):
    assert read_number(repr(number)) == number


@given(st.integers(-(10**15), 10**15))
def test_thousands_separators(number):
    assert read_number(f"{number:,}") == number


@given(st.integers(-999, 999), st.integers(1, 999))
def test_fractions(top, bottom):
    written = (f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}", rf"\dfrac {{{top}}} {{{bottom}}} \text{{ m}}")
    assert [read_number(text) for text in written] == [pytest.approx(top / bottom)] * 3


@given(
    st.one_of(
        st.text(),
        st.lists(
            st.sampled_from(
                [r"\frac", r"\sqrt", "{", "}", "^", "9", "1", "0", ".", "/", "-", r"\pi", "e9", ",", " ", "%"]
            )
        ).map("".join),
    )
)
def test_anything_is_a_finite_number_or_none(text):
    number = read_number(text)
    assert number is None or math.isfinite(number)


@pytest.mark.parametrize(
    ("answer", "gold", "tolerances", "close"),
    [
        ("14", "14", {}, True),
        ("14.0", "14", {}, True),
        ("14.7", "14", {}, False),
        ("14 apples", "14", {}, True),
        ("0.64", "0.6", {"precision": 1}, True),
        ("0.66", "0.6", {"precision": 1}, False),
        (r"\frac{3}{5}", "0.6", {"precision": 1}, True),
        ("1.454", "1.45", {"precision": 2}, True),
        ("1.456", "1.45", {"precision": 2}, False),
        ("2.094", "2.0944", {"rel_tol": 0.0, "abs_tol": 0.001}, True),
        (r"\frac{2\pi}{3}", "2.0944", {"rel_tol": 0.0, "abs_tol": 0.001}, True),
        ("2.09", "2.0944", {"rel_tol": 0.0, "abs_tol": 0.001}, False),
        ("101", "100", {"rel_tol": 0.01}, True),
        ("75%", "75", {}, True),
        ("75%", "0.75", {}, True),
        ("0.75", "75%", {}, True),
        ("75%", "75%", {}, True),
        ("75%", "7.5", {}, False),
        ("0.75%", "75%", {}, False),
        ("fourteen", "14", {}, False),
        ("14", "many", {}, False),
        ("", "0", {}, False),
    ],
)
def test_close(answer, gold, tolerances, close):
    assert is_close(answer, gold, **tolerances) is close


@given(st.floats(-1e6, 1e6), st.integers(0, 6))
def test_rounding_to_the_precision_is_close(number, precision):
    assert is_close(repr(number), repr(round(number, precision)), precision=precision)


def test_lists():
    assert read_numbers("[2007, 2008]") == [2007, 2008]
    assert read_numbers(r"\{1.5, \frac{1}{2}\}".replace("\\frac{1}{2}", "1/2")) == [1.5, 0.5]
    assert read_numbers("5") == [5]
    assert read_numbers("[1, x]") is read_numbers("[]") is read_numbers("") is read_numbers("[1," * 200) is None


def test_reward():
    texts = [r"\boxed{3.1416}", r"\boxed{3.14 \text{ cm}}", r"\boxed{3}", "3.1416", r"\boxed{"]
    assert numeric_reward(completions=texts, answer=["3.14159"] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert numeric_reward(completions=texts, answer=[3.14159] * 5, rel_tol=0.01, other=[0] * 5)[:3] == [1.0, 1.0, 0.0]
    precise = numeric_reward(completions=texts, answer=["3.1"] * 5, precision=[1, 1, 1, None, None])
    assert precise == [1.0, 1.0, 0.0, 0.0, 0.0]
    conversation = [[{"role": "assistant", "content": texts[0]}]]
    assert numeric_reward(completions=conversation, answer=["3.1416"]) == [1.0]


def test_reward_names_bad_columns():
    with pytest.raises(ValueError, match="1 completions came with 2 values of `answer` and 1 of `precision`"):
        numeric_reward(completions=["1"], answer=["1", "2"])
    with pytest.raises(ValueError, match="`answer` must be a number for `numeric_reward`, got 'x'"):
        numeric_reward(completions=["1"], answer=["x"])
