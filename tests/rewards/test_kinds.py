r"""
Pairs of an answer and a gold answer, made up by kind: everything that an answer check is known to be fooled by, and
every notation that it has to know. tests/rewards/reward_pairs.tsv has them with the score due.
"""

import csv
import itertools
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sapo_trl.rewards import accuracy_reward
from sapo_trl.rewards.judge import judge
from sapo_trl.rewards.notation import as_latex, gold_as_latex


FAST = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def is_right(answer: str, gold: str) -> bool:
    """As in a worker, here: hypothesis asks a thousand times."""
    latex, gold_latex = as_latex(answer), gold_as_latex(gold)
    return latex == gold_latex or judge(latex, gold_latex) == "equal"


def test_made_up_pairs():
    with (Path(__file__).parent / "reward_pairs.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) > 800 and {row["right"] for row in rows} == {"0", "1"}
    rewards = accuracy_reward(
        completions=[rf"\boxed{{{row['answer']}}}" for row in rows], answer=[row["gold"] for row in rows]
    )
    assert [row for row, reward in zip(rows, rewards, strict=True) if reward != float(row["right"])] == []


class TestUnknowns:
    LETTERS = "abdghkmnprtvxyz"  # f, i and e mean something
    TEMPLATES = [
        r"{0}+{1}",
        r"{0}-{1}",
        r"\frac{{{0}}}{{{1}}}",
        r"{0}^2-{1}^2",
        r"\sqrt{{{0}^2+{1}^2}}",
        r"\pi({0}^2-{1}^2)",
        r"\frac{{{0}{1}}}{{{0}+{1}}}",
        r"{0}\sin {1}",
        r"2{0}_1+{1}",
    ]

    @pytest.mark.parametrize("template", TEMPLATES)
    @FAST
    @given(letter=st.sampled_from(LETTERS))
    def test_both_cases_of_a_letter_are_two_unknowns(self, template, letter):
        large, small = letter.upper(), letter
        gold = template.format(large, small)
        assert is_right(template.format(large, small) + "+0", gold)
        for other in (template.format(small, small), template.format(large, large), "0", "1", "2" + small):
            assert not is_right(other, gold)

    @FAST
    @given(st.sampled_from(LETTERS))
    def test_alone(self, letter):
        assert not is_right(letter, letter.upper())
        assert not is_right(letter.upper() + "_1", letter + "_1")


MAGNITUDES = st.integers(-40, 30)
DIGITS = st.integers(1, 9999)


def notations(digits: int, exponent: int) -> list[str]:
    """A number in scientific and other notations."""
    value = Fraction(digits) * Fraction(10) ** exponent
    found = [
        rf"{digits}\times10^{{{exponent}}}",
        rf"{digits} \cdot 10^{{{exponent}}}",
        f"{digits}e{exponent}",
        f"{digits}E{exponent}",
        f"{digits} × 10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")),
        f"{digits}*10^({exponent})",
        rf"{digits}0\times 10^{{{exponent - 1}}}",
        rf"\frac{{{value.numerator}}}{{{value.denominator}}}",
    ]
    if exponent < 0:
        found += [rf"\frac{{{digits}}}{{10^{{{-exponent}}}}}", _decimal(value, -exponent)]
    return found


class TestMagnitudes:
    @FAST
    @given(DIGITS, MAGNITUDES)
    def test_every_notation_of_a_number_is_the_number(self, digits, exponent):
        written = notations(digits, exponent)
        assert all(is_right(answer, gold) for answer, gold in itertools.product(written, repeat=2))

    @FAST
    @given(DIGITS, MAGNITUDES, DIGITS, MAGNITUDES)
    def test_different_numbers_are_different_however_small(self, digits, exponent, other_digits, other_exponent):
        same = Fraction(digits) * Fraction(10) ** exponent == Fraction(other_digits) * Fraction(10) ** other_exponent
        for answer in notations(other_digits, other_exponent):
            assert is_right(answer, notations(digits, exponent)[0]) == same
        assert not is_right("0", notations(digits, exponent)[0])

    @FAST
    @given(
        st.integers(1, 60), st.integers(1, 60), st.sampled_from(["e^{{-{}}}", r"\frac{{1}}{{2^{{{}}}}}", "3^{{-{}}}"])
    )
    def test_powers(self, a, b, template):
        assert is_right(template.format(a), template.format(b) + "+0") == (a == b)

    @FAST
    @given(st.integers(2, 500), st.integers(1, 14))
    def test_a_decimal_stands_for_a_root_from_six_places_on(self, radicand, places):
        exact = Fraction(math.isqrt(radicand * 10**60), 10**30)
        is_square = math.isqrt(radicand) ** 2 == radicand
        assert is_right(_decimal(exact, places), rf"\sqrt{{{radicand}}}") == (is_square or places >= 6)
        wrong = _decimal(exact + Fraction(3, 10**places), places)
        assert not is_right(wrong, rf"\sqrt{{{radicand}}}")


def _decimal(value: Fraction, places: int) -> str:
    """A number rounded half up, exactly."""
    digits = str(int(value * 10**places + Fraction(1, 2))).rjust(places + 1, "0")
    return f"{digits[:-places]}.{digits[-places:]}"


class TestNames:
    @FAST
    @given(st.permutations("ABCD"), st.permutations("ABCD"), st.integers(2, 4))
    def test_letters_in_another_order(self, one, other, size):
        answer, gold = "".join(one[:size]), "".join(other[:size])
        for wrap in ("{}", r"\text{{{}}}", r"\triangle {}", r"\vec{{{}}}"):
            assert is_right(wrap.format(answer), wrap.format(gold)) == (answer == gold)
        # The vertex is in the middle; a segment has no direction.
        same = answer == gold or (answer == gold[::-1] and size == 3)
        assert is_right(rf"\angle {answer}", rf"\angle {gold}") == same
        same = answer == gold or (answer == gold[::-1] and size == 2)
        assert is_right(rf"\overline{{{answer}}}", rf"\overline{{{gold}}}") == same
        assert is_right(answer, rf"\overline{{{gold}}}") == same

    @FAST
    @given(st.sampled_from("abkmpqrtwxyzABCKMPQRZ"), st.sampled_from("abkmpqrtwxyzABCKMPQRZ"))
    def test_a_bar_over_one_letter_is_another_symbol(self, one, other):
        for bar in (rf"\overline{{{one}}}", rf"\bar{{{one}}}", rf"\bar {one}"):
            assert not is_right(other, bar) and not is_right(bar, other)
            assert is_right(bar, rf"\overline{{{other}}}") == (one == other)
            assert not is_right(rf"{other} \vee 5", rf"{bar} \vee 5")
        # By its digits, a number: 10 times one, and the other.
        if one.islower() and other.islower():
            assert not is_right(one + other, rf"\overline{{{one}{other}}}")
            assert is_right(rf"\overline{{{one}{other}}}", rf"\overline{{{other}{one}}}") == (one == other)

    @pytest.mark.parametrize(
        "word", ["listen", "night", "odd", "Monday", "rhombus", "no", "saw", "ASA", "even", "east"]
    )
    def test_anagrams(self, word):
        others = {"".join(letters) for letters in itertools.islice(itertools.permutations(word), 200)} - {word}
        assert others
        for other in others:
            assert not is_right(other, word) and not is_right(rf"\text{{{other}}}", word)

    @pytest.mark.parametrize("word", ["yes", "Monday", "isosceles", "true", "no solution"])
    def test_wrappers_and_case(self, word):
        for answer in (
            word.upper(),
            word.capitalize(),
            rf"\text{{{word}}}",
            rf"\textbf{{{word}.}}",
            f"**{word}**",
            f"${word}$",
        ):
            assert is_right(answer, word), answer

    @FAST
    @given(st.sampled_from("fghx"), st.integers(0, 2), st.integers(0, 2))
    def test_primes(self, letter, one, other):
        for template in ("{}{}(2)", "{}{}"):
            answer, gold = template.format(letter, "'" * one), template.format(letter, "'" * other)
            assert is_right(answer, gold) == (one == other)
            assert is_right(template.format(letter, r"^{" + r"\prime" * one + "}") if one else answer, gold) == (
                one == other
            )


UNITS = {
    # Each in its own dimension.
    "cm": 1,
    "kg": 2,
    "hours": 3,
    "dollars": 4,
    "students": 5,
    "cm^2": 6,
    "miles per hour": 7,
    "degrees": 8,
    "euros": 9,
    "apples": 10,
    "square feet": 6,
    "months": 12,
    "volts": 13,
}
NUMBERS = st.integers(2, 5000)
NO_UNITS = (
    "is wrong|increase|decrease|north|AM|or more|to 9|mod 7|more|times as much|not|remainder 1|and a bit|but|years ago"
    "|less"
).split("|")


class TestText:
    @FAST
    @given(
        NUMBERS,
        st.sampled_from(sorted(UNITS)),
        st.sampled_from(["{}\\text{{ {}}}", "{}\\,\\mathrm{{{}}}", "\\text{{{} {}}}"]),
    )
    def test_units_are_left_out_where_the_gold_has_none(self, number, unit, template):
        assert is_right(template.format(number, unit), str(number))
        assert not is_right(template.format(number + 1, unit), str(number))

    @FAST
    @given(NUMBERS, st.sampled_from(sorted(UNITS)), st.sampled_from(sorted(UNITS)))
    def test_another_unit_is_another_answer(self, number, unit, other):
        assume(UNITS[unit] != UNITS[other])
        assert not is_right(rf"{number}\text{{ {unit}}}", rf"{number}\text{{ {other}}}")

    @FAST
    @given(NUMBERS, st.sampled_from(NO_UNITS), st.sampled_from(NO_UNITS))
    def test_other_text_is_no_unit(self, number, text, other):
        answer = rf"{number}\text{{ {text}}}"
        assert not is_right(answer, str(number))
        assert not is_right(rf"\text{{{text} }} {number}", str(number))
        assert is_right(answer, f"{number} {other}") == (text == other)

    @FAST
    @given(st.integers(1, 99), st.sampled_from(["thousand", "million", "billion", "trillion"]), st.integers(0, 3))
    def test_scales(self, number, word, power):
        scale = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}[word]
        other = 3 * power + 3
        for answer in (f"{number} {word}", rf"{number}\text{{ {word}}}", rf"\${number} \text{{ {word}}}"):
            assert is_right(answer, str(number * 10**other)) == (scale == other)
            assert not is_right(answer, str(number))

    @pytest.mark.parametrize(
        ("answer", "gold"),
        [
            ("50 mm", "5 cm"),
            ("1.5 hours", "90 minutes"),
            ("36 km/h", "10 m/s"),
            ("500 cents", "\\$5"),
            ("1 m^2", "10000 cm^2"),
        ],
    )
    def test_units_are_converted(self, answer, gold):
        def written(text: str) -> str:
            number, _, unit = text.partition(" ")
            return rf"{number}\text{{ {unit}}}" if unit else text

        assert is_right(written(answer), written(gold)) and is_right(written(gold), written(answer))
        assert not is_right("2" + written(answer), written(gold))


class TestPercent:
    @FAST
    @given(st.integers(1, 400))
    def test_percent_is_a_share_and_from_1_on_its_number(self, tenths):
        percent = Fraction(tenths, 10)
        shown = f"{float(percent):g}"
        share = f"{float(percent / 100):.6f}".rstrip("0")
        assert is_right(share, rf"{shown}\%") and is_right(rf"{shown}\%", share)
        assert is_right(rf"{shown}\%", shown) == (percent > 1)  # half a percent is no half
        assert not is_right(rf"{shown}\%", f"{float(percent * 100):g}")


class TestAngles:
    @FAST
    @given(st.integers(0, 179), st.integers(0, 59), st.integers(0, 59), st.integers(0, 59))
    def test_minutes_and_seconds(self, degrees, minutes, seconds, other):
        value = degrees + Fraction(minutes, 60)
        for answer in (
            rf"{degrees}^\circ {minutes}'",
            f"{degrees}°{minutes}′",
            rf"{degrees}^{{\circ}}{minutes}^{{\prime}}",
        ):
            assert is_right(answer, rf"\frac{{{value.numerator}}}{{{value.denominator}}}^\circ")
            assert is_right(answer, f"{degrees}° {other}'") == (minutes == other)
            assert is_right(f"{answer} {seconds}''", answer) == (seconds == 0)
            assert not is_right(str(degrees * minutes + 1), answer)
        assert not is_right(f"{degrees}° {minutes + 60}'", f"{degrees + 1}° {minutes}'")


ONES = "zero one two three four five six seven eight nine ten eleven twelve".split()


class TestSpoken:
    @FAST
    @given(st.integers(0, 12), st.integers(0, 12))
    def test_numbers_in_words(self, one, other):
        for word in (ONES[one], ONES[one].capitalize(), rf"\text{{{ONES[one]}}}"):
            assert is_right(word, str(other)) == (one == other)
            assert is_right(str(other), word) == (one == other)
            assert not is_right(rf"\text{{not {ONES[one]}}}", str(one))
            assert not is_right(f"{ONES[one]} or {ONES[other]}", str(one))

    @FAST
    @given(st.integers(1, 9), st.integers(0, 99))
    def test_tens(self, one, other):
        assert is_right(f"twenty-{ONES[one]}", str(other)) == (other == 20 + one)
        assert is_right(rf"\text{{ninety {ONES[one]}}}", str(other)) == (other == 90 + one)

    @FAST
    @given(st.integers(1, 130), st.sampled_from(["st", "nd", "rd", "th"]), st.integers(1, 130))
    def test_ordinals_have_one_ending(self, number, ending, other):
        teen = number % 100 in (11, 12, 13)
        due = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if not teen else "th"
        for answer in (f"{number}{ending}", rf"{number}^{{\text{{{ending}}}}}", rf"{number}\text{{{ending}}}"):
            assert is_right(answer, str(number)) == (ending == due)
            assert other == number or not is_right(answer, str(other))

    @pytest.mark.parametrize(
        "word", ["fifth", "half", "seven halves", "seven hundred", "lucky seven", "seven point five"]
    )
    def test_other_words_are_no_numbers(self, word):
        assert not any(is_right(word, gold) for gold in ("5", "7", "0.5", "700", "7.5", r"\frac{1}{5}"))


SMALL = st.integers(1, 99)


class TestWhatShows:
    @FAST
    @given(SMALL, SMALL)
    def test_braces_do_not_show(self, one, other):
        for answer in (
            f"{one}{{{other}}}",
            f"{{{one}}}{{{other}}}",
            rf"{one}\color{{white}}{{{other}}}",
            rf"{one}\,{{{other}}}",
            rf"{one}\phantom{{{other}}}",
            rf"{one} % {other}",
            f"{one} <!-- {other} -->",
        ):
            assert not any(is_right(answer, str(gold)) for gold in (one * other, one, other)), answer
        assert is_right(f"{one}({other})", str(one * other))
        assert not is_right(rf"{{{one}}}\frac{{1}}{{2}}", rf"\frac{{{one}}}{{2}}")
        assert is_right(f"{one}{{x}}", f"{one}x")

    @pytest.mark.parametrize(
        "name",
        [
            r"x \not",
            r"\lnot x ",
            r"\ln x",
            r"\log_2 x",
            "|x|",
            r"\text{anything but}",
            r"\text{at least}",
            r"\text{nothing}",
        ]
        + [
            r"\text{twice the answer}",
            r"\text{more than}",
            r"\text{half of it}",
            r"\neg x",
            r"\text{minus the answer}",
        ],
    )
    def test_names_of_other_values(self, name):
        for gold in ("5", r"\sqrt{2}"):
            assert not is_right(f"{name} = {gold}", gold)

    @pytest.mark.parametrize(
        "name",
        [
            "x",
            "AB",
            "|AB|",
            r"\lvert AB \rvert",
            "|z|",
            r"\bar{x}",
            r"\hat{y}",
            r"\sin \theta",
            r"x_{\max}",
            r"\Delta x",
            "E(X)",
        ]
        + [r"\lim_{x\to 0} f(x)", r"P(A \cap B)", r"S_{\triangle ABC}", r"\text{least common multiple}", r"|\vec{a}|"],
    )
    def test_names_of_the_value(self, name):
        for gold in ("5", r"\sqrt{2}"):
            assert is_right(f"{name} = {gold}", gold)
            assert not is_right(f"{name} = {gold}", gold + "+1")


class TestSetsOfNumbers:
    @FAST
    @given(
        st.integers(-9, 9),
        st.sampled_from(["2x", "-x", "x^2", "x+1", r"x \not", "y", r"x \in \mathbb{Z}", r"\frac{x}{2}"]),
    )
    def test_elements_are_the_unknown_itself(self, low, element):
        interval = f"({low}, {low + 2})"
        assert not is_right(rf"\{{{element} \mid {low} < x < {low + 2}\}}", interval)
        if element != "y":
            assert not is_right(rf"{element} \in {interval}", interval)
        for answer in (rf"\{{x \mid {low} < x < {low + 2}\}}", rf"\{{x \in \mathbb{{R}} : {low} < x < {low + 2}\}}"):
            assert is_right(answer, interval)
        assert is_right(rf"x \in {interval}", interval)

    @FAST
    @given(st.lists(st.integers(-9, 9), min_size=2, max_size=4, unique=True), st.randoms(use_true_random=False))
    def test_repeats_change_no_set(self, values, random):
        texts = [str(value) for value in values]
        gold, repeated = rf"\{{{', '.join(texts)}\}}", ", ".join(random.sample([*texts, texts[0]], len(texts) + 1))
        assert is_right(rf"\{{{repeated}\}}", gold)
        assert not is_right(gold, rf"\{{{repeated}\}}")  # a gold that repeats itself means it
        assert not is_right(f"({repeated})", f"({', '.join(texts)})")
        assert not is_right(repeated, ", ".join(texts))
        # A set of a set has another element.
        assert not is_right(rf"\{{\{{{texts[0]}\}}, {', '.join(texts[1:])}\}}", gold)


class TestOrder:
    @FAST
    @given(st.lists(st.integers(-20, 20), min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False))
    def test_tuples_sets_and_lists(self, values, random):
        texts = [str(value) for value in values]
        shuffled = random.sample(texts, len(texts))
        same = shuffled == texts
        joined, other = ", ".join(texts), ",".join(shuffled)
        assert is_right(f"({other})", f"({joined})") == same
        assert is_right(rf"\langle {other} \rangle", f"({joined})") == same
        assert is_right(rf"\{{{other}\}}", rf"\{{{joined}\}}")
        assert is_right(other, joined) and is_right(other, rf"\{{{joined}\}}")
        assert is_right(r" \text{ or } ".join(shuffled), joined)
        assert not is_right(f"({joined})", rf"\{{{joined}\}}")
        assert not is_right(", ".join(texts[:-1]), joined) and not is_right(joined + ", 77", joined)
        assert not is_right("".join(texts), joined)

    @FAST
    @given(st.permutations(["x", "y", "z"]), st.lists(st.integers(-9, 9), min_size=3, max_size=3, unique=True))
    def test_assignments(self, order, values):
        value = dict(zip("xyz", values, strict=True))
        answer = ", ".join(f"{name}={value[name]}" for name in order)
        assert is_right(answer, "x={}, y={}, z={}".format(*values))
        assert is_right(answer, "({},{},{})".format(*values))
        assert not is_right(answer, "({2},{0},{1})".format(*values))
        assert not is_right("x={2}, y={0}, z={1}".format(*values), answer)

    @FAST
    @given(st.integers(-9, 9), st.integers(1, 9), st.sampled_from("()[]"), st.sampled_from("()[]"))
    def test_intervals(self, low, width, left, right):
        left, right = "(" if left in "()" else "[", ")" if right in "()" else "]"
        high = low + width
        interval = f"{left}{low},{high}{right}"
        signs = "<" if left == "(" else r"\le", "<" if right == ")" else r"\le"
        assert is_right(f"{low} {signs[0]} x {signs[1]} {high}", interval)
        assert is_right(interval, f"{low} {signs[0]} x {signs[1]} {high}")
        european = ("[" if left == "[" else "]") + f"{low},{high}" + ("]" if right == "]" else "[")
        assert is_right(european, interval)
        for other in ("()", "(]", "[)", "[]"):
            if other != left + right:
                assert not is_right(f"{other[0]}{low},{high}{other[1]}", interval)
        assert not is_right(f"{left}{low},{high + 1}{right}", interval)


class TestLiterals:
    @FAST
    @given(st.integers(1, 4000), st.integers(2, 16), st.integers(2, 16), st.integers(1, 4000))
    def test_bases(self, number, base, other_base, other):
        gold = f"{_in_base(number, base)}_{{{base}}}"
        assume(any(character.isdigit() for character in _in_base(number, base)))
        assert is_right(rf"{_in_base(number, base)}_{base}" if base < 10 else gold, gold)
        assert is_right(rf"\text{{{_in_base(number, base)}}}_{{{base}}}", gold)
        assert not is_right(str(number), gold)
        if base != other_base:
            assert not is_right(f"{_in_base(number, base)}_{{{other_base}}}", gold)
        if number != other:
            assert not is_right(f"{_in_base(other, base)}_{{{base}}}", gold)

    @FAST
    @given(
        st.integers(1, 12),
        st.integers(0, 59),
        st.integers(1, 12),
        st.integers(0, 59),
        st.sampled_from(["AM", "PM", ""]),
    )
    def test_times(self, hour, minute, other_hour, other_minute, half):
        gold = f"{hour}:{minute:02} {half}".strip()
        assert is_right(rf"{hour}:{minute:02}\text{{ {half.lower()}}}" if half else gold, gold)
        if (hour, minute) != (other_hour, other_minute):
            assert not is_right(f"{other_hour}:{other_minute:02} {half}".strip(), gold)
        for other in {"AM", "PM", ""} - {half}:
            assert not is_right(f"{hour}:{minute:02} {other}".strip(), gold)
        assert not is_right(rf"\frac{{{hour}}}{{{minute or 1}}}", gold)

    @FAST
    @given(st.tuples(st.integers(1, 12), st.integers(1, 28), st.integers(1990, 2030)), st.integers(2, 5))
    def test_dates_are_no_quotients(self, date, factor):
        month, day, year = date
        gold = f"{month}/{day}/{year}"
        assert is_right(f"{month:02}/{day:02}/{year}", gold)
        assert not is_right(f"{month * factor}/{day * factor}/{year}", gold)
        assert month == day or not is_right(f"{day}/{month}/{year}", gold)
        assert not is_right(rf"\frac{{{month}}}{{{day * year}}}", gold)

    @FAST
    @given(st.lists(st.integers(1, 9), min_size=3, max_size=4), st.integers(2, 5))
    def test_ratios(self, parts, factor):
        gold = ":".join(map(str, parts))
        assert is_right(" : ".join(str(part * factor) for part in parts), gold)
        changed = [*parts[:-1], parts[-1] + 1]
        assert not is_right(":".join(map(str, changed)), gold)
        assert not is_right(":".join(map(str, parts[:-1])), gold)
        assert not is_right(rf"\frac{{{parts[0]}}}{{{math.prod(parts[1:])}}}", gold)


def _in_base(number: int, base: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, base)
        digits = "0123456789ABCDEF"[digit] + digits
    return digits


class TestRepeatingDecimals:
    @FAST
    @given(st.integers(0, 9), st.text("0123456789", max_size=3), st.text("0123456789", min_size=1, max_size=4))
    def test_periods(self, whole, start, period):
        value = Fraction(int(f"{whole}{start}"), 10 ** len(start))
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(start))
        gold = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        answers = [rf"{whole}.{start}\overline{{{period}}}", rf"{whole}.{start}\bar{{{period}}}"]
        if not start:
            answers.append(f"{whole}.({period})")
        assert all(is_right(answer, gold) for answer in answers)
        cut = Fraction(f"{whole}.{start}{period}")
        assert is_right(f"{whole}.{start}{period}", gold) == (
            cut == value
            or (len(start + period) >= 6 and abs(cut - value) <= Fraction(1, 2 * 10 ** len(start + period)))
        )


# One a line, with # for the answer.
WRAPPERS = r"""
 #
#.
#,
#\,
#\\
#\quad
$#$
$$#$$
\(#\)
\[#\]
\boxed{#}
\boxed {#}
\boxed{ \boxed{#} }
\Large #
\displaystyle #
**#**
`#`
\color{red}{#}
\textcolor{blue}{#}
\underline{#}
x = #
\therefore #
\approx #
\text{Area} = #
\text{the answer is } #
答案是#
\angle ABC = #
P(A) = #
= #
""".strip("\n").split("\n")
TAKEN_BACK = r"""
\text{not } #
# \text{ is wrong}
#, 5
# \text{ or } 5
\neq #
x < #
# = 5
5 = #
~~#~~
#...
\pm #
#x
\{#, 5\}
(#, 5)
""".strip().split("\n")


class TestWrappers:
    @pytest.mark.parametrize("wrapper", [*WRAPPERS, "\u200b#", "# "])
    def test_an_answer_in_a_wrapper_is_the_answer(self, wrapper):
        for gold, other in (("4", "5"), ("-5", "5"), (r"6\sqrt{3}", r"5\sqrt{3}"), (r"\frac{1}{3}", r"\frac{1}{2}")):
            assert is_right(wrapper.replace("#", gold), gold)
            assert not is_right(wrapper.replace("#", other), gold)

    @pytest.mark.parametrize("text", TAKEN_BACK)
    def test_what_takes_an_answer_back(self, text):
        for gold in ("4", "-7", r"6\sqrt{3}", r"\frac{1}{3}"):
            assert not is_right(text.replace("#", gold), gold)
