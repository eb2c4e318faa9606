"""
Each benchmark's scorer is compared with the authors' rule, on hand-made answers in every form.

The authors' rules are restated below in a few lines. The table has the right verdict for each answer, and our scorer
must give it. A mark (`THEY_ACCEPT`, `THEY_REFUSE`) says that the authors' rule gives the other verdict.
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mathruler.grader import grade_answer

from sapo_trl.evaluation.benchmarks import BENCHMARKS
from sapo_trl.evaluation.benchmarks.dynamath import MONTHS, is_same_text
from tests.evaluation.benchmark_rows import (
    ROWS,
    dynamath_row,
    mathverse_row,
    mathvista_row,
    mmbench_row,
    mmstar_row,
    science_row,
    wemath_row,
)


SAME, THEY_ACCEPT, THEY_REFUSE = "same", "they accept", "they refuse"


# ---------------------------------------------------------------------------------------- the authors' rules, restated


def dynamath(row: dict, answer: str) -> bool:
    """`evaluation/`: the first word as a number within 0.001; a letter; a text that has the gold in it."""
    gold = row["ground_truth"]
    if row["answer_type"] == "float":
        word = answer.split(" ")[0]
        number, pi, _ = word.partition("π")
        try:
            return abs(float(number) * (3.141592653589793 if pi else 1) - float(gold)) <= 0.001
        except ValueError:
            return False
    if row["answer_type"] == "multiple choice":
        return answer == gold if len(answer) == 1 else gold in answer[:3]
    return gold in answer


def wemath(row: dict, answer: str) -> bool:
    """`evaluation/accuracy.py`: the first character behind the last `Answer`."""
    rest = re.sub(r"[><:.]", "", f"Answer: {answer}".split("Answer")[-1].strip()).strip()
    return rest[:1] in list("ABCDEFGH") and rest[0] == row["answer"]


def logicvista(row: dict, answer: str) -> bool:
    """`eval/extract_accuracy.py`: the letters that a language model extracts, in any order, are those of the gold."""
    extracted = re.findall(r"\b[A-Za-z0-9]\b", answer.replace("and", ","))
    return sorted(letter.lower() for letter in extracted) == sorted(row["answer"].lower().split(", "))


def mathvista(row: dict, answer: str) -> bool:
    """`evaluation/calculate_score.py`, without the edit distance that takes any text for the nearest option."""
    if row["question_type"] == "multi_choice":
        inside = re.findall(r"\(([a-zA-Z])\)", answer)
        letter, letters = inside[0].upper() if inside else answer, "ABCDEFGH"[: len(row["choices"])]
        chosen = row["choices"][letters.index(letter)] if letter in list(letters) else answer
        return chosen == row["answer"]
    try:
        number = None if row["answer_type"] == "list" else float(answer)
    except ValueError:
        return False
    if row["answer_type"] == "integer":
        return str(int(number)) == row["answer"]
    return (answer if number is None else str(round(number, int(row["precision"])))) == row["answer"]


def mathverse(row: dict, answer: str) -> bool:
    """`evaluation/score_answer_s2.py` asks a language model whether answer and gold agree: by hand here."""
    return answer in AGREE[row["answer"]]


def scienceqa(row: dict, answer: str) -> bool:
    """`models/run_gpt3.py`: the letter of `The answer is B.`, else a random one."""
    return answer == "ABCDE"[row["answer"]]


def mmmu(row: dict, answer: str) -> bool:
    """`mmmu/utils/eval_utils.py`: a letter alone or in parentheses; an open gold inside, or equal to two decimals."""
    if row["question_type"] == "multiple-choice":
        found = [
            letter for letter in "ABCD" if f"({letter})" in answer or f" {letter} " in f" {answer.strip(',.!?;:')} "
        ]
        return found[-1:] == [row["answer"]]
    golds = row["answer"].strip("[]'").split("', '")
    for gold in golds:
        try:
            if round(float(answer.replace(",", "")), 2) == round(float(gold), 2):
                return True
        except ValueError:
            if not gold.replace(".", "").isdigit() and gold.lower() in answer.lower():
                return True
    return False


def mmbench(row: dict, answer: str) -> bool:
    """VLMEvalKit's `can_infer`: exactly one letter among the words, or exactly one option's text."""
    words = re.sub(r"[.()[\],:;!*#{}]", " ", answer).split()
    letters = [letter for letter in "ABCD" if letter in words]
    options = [letter for letter in "ABCD" if row[letter] != "nan" and row[letter].lower() in answer.lower()]
    return (letters if len(letters) == 1 else options) == [row["answer"]]


def mmstar(row: dict, answer: str) -> bool:
    """`eval/vlmeval/evaluate/mmstar.py`: the first character, behind a parenthesis or one of two phrases."""
    text = answer.lower().strip()
    for start in ("(", "option ", "the answer is ", ""):
        if text.startswith(start):
            return text[len(start) : len(start) + 1] == row["answer"].lower()
    return False


def gsm8k(row: dict, answer: str) -> bool:
    """`grade_school_math/dataset.py`: the digits behind `####`, without commas, are the same text."""
    gold, given = (re.search(r"#### (-?[0-9.,]+)", text) for text in (row["answer"], f"#### {answer}"))
    return given is not None and given[1].replace(",", "") == gold[1].replace(",", "")


def graded(row: dict, answer: str) -> bool:
    """PRM800K's grader, which mathruler (verl, EasyR1) took over: normalised text, then SymPy."""
    return grade_answer(answer, row["answer"])


RULES = {
    "dynamath": dynamath,
    "wemath": wemath,
    "logicvista": logicvista,
    "mathvista": mathvista,
    "mathverse": mathverse,
    "scienceqa": scienceqa,
    "mmmu": mmmu,
    "mmbench": mmbench,
    "mmstar": mmstar,
    "gsm8k": gsm8k,
    "math500": graded,
    "geo3k": graded,
}

# ------------------------------------------------------------------------------------------------------------- answers

AGREE = {
    "B": {"B", "45°"},
    "(C)": {"C"},
    "A\nC": {"A, C", "C and A"},
    r"Area $=9.4 \mathrm{~cm}^{2}$": {"9.4", r"9.4 \text{ cm}^2", r"9.40"},
    r"$x^{2}+y^{2}=49$": {"x^2+y^2=49"},
    r"132 ^\circT": set(),
}
_LETTER = dynamath_row("5", "Is it? Choices: (A) yes (B) no", "B", "multiple choice")
_CHOICES = "Choices:\nA:30°\nB:45°\nC:60°\nD:90°"


def _text(gold: str) -> dict:
    return dynamath_row("2", "Which?", gold, "text")


def _number(gold: str, kind: str = "float") -> dict:
    return dynamath_row("1", "How much?", gold, kind)


def _logic(gold: str) -> dict:
    return ROWS["logicvista"][0] | {"answer": gold}


def _open(gold: str) -> dict:
    return ROWS["mmmu"][1] | {"answer": gold}


_WE, _SCIENCE, _CIRCULAR = wemath_row("1", "2steps_1"), science_row(), mmbench_row(1, "B", "cat", "dog", "owl")
_STAR = mmstar_row(1, "Which?\nOptions: A: a blue car, B: a red car, C: a boat, D: a train", "B")
_TWO = mathvista_row("5", "q", "same", "text", choices=["other", "same", "same"])
_LABELLED = mathvista_row("5", "q", "(b)", "text", choices=["(c)", "(a)", "(e)", "(d)", "(b)"])
_GRAMS = {"question": "q", "answer": "...\n#### 1,250"}

# A row, what stands in the box, whether it is right, and what the authors' rule says to it.
CASES = {
    "dynamath": [
        (_number("2.0944"), "2.094", 1, SAME),
        (_number("2.0944"), "2.0953", 1, SAME),
        (_number("2.0944"), "2.0955", 0, SAME),
        (_number("-3.0"), "-3", 1, SAME),
        (_number("6.2832"), "2π", 1, SAME),
        (_number("2.0"), "2 cm", 1, SAME),
        (_number("0.5"), r"\frac{1}{2}", 1, THEY_REFUSE),
        (_number("49", "single answer"), "49", 1, SAME),
        (_number("49", "single answer"), "149", 0, THEY_ACCEPT),
        (_number("5.000000000000001", "int"), "5", 1, THEY_REFUSE),
        (_number("-15.700000000000001", "int"), "-15.7", 1, THEY_REFUSE),
        (_number("-15.700000000000001", "int"), "15.7", 0, SAME),
        (_LETTER, "B", 1, SAME),
        (_LETTER, "(B)", 1, SAME),
        (_LETTER, "A", 0, SAME),
        (_LETTER, "C", 0, SAME),
        (_text("Sep"), "Sep", 1, SAME),
        (_text("Sep"), "September", 1, SAME),
        (_text("Sep"), "Oct", 0, SAME),
        (_text("Sep"), "not Sep", 0, THEY_ACCEPT),
        (_text("May"), "Amy", 0, SAME),
        (_text("5:0"), "5:00", 1, SAME),
        (_text("5:0"), "5:05", 0, THEY_ACCEPT),
        (_text("00:22"), "0:22", 1, THEY_REFUSE),
        (_text("11/02/2006"), "11/02/2006", 1, SAME),
        (_text("11/02/2006"), "11/2/2006", 1, THEY_REFUSE),
        (_text("11/02/2006"), "02/11/2006", 0, SAME),
        (_text("11/02/2006"), "22/04/4012", 0, SAME),
        (_text("(-2, 4)"), "(-2, 4)", 1, SAME),
        (_text("(-2, 4)"), r"\left(-2,4\right)", 1, THEY_REFUSE),
        (_text("(-2, 4)"), "-2, 4", 1, THEY_REFUSE),
        (_text("(-2, 4)"), "(4, -2)", 0, SAME),
        (_text("(-2, 4)"), r"\{-2, 4\}", 0, SAME),
        (_text("(-2, 4)"), "(-2, 4, 1)", 0, SAME),
        (_text("(5.000, -4.000)"), "(5, -4)", 1, THEY_REFUSE),
        (_text("(-2.777, -1.136)"), "(-2.7766, -1.1361)", 1, THEY_REFUSE),
        (_text("[3, 2, 3, 3, 6]"), "[3,2,3,3,6]", 1, THEY_REFUSE),
        (_text("[3, 2, 3, 3, 6]"), "[2, 3, 3, 3, 6]", 0, SAME),
        (_text("[3, 2, 3, 3, 6]"), "[3, 2, 6]", 0, SAME),
        (_text("69, 51, 59"), "69, 51, 59", 1, SAME),
        (_text("69, 51, 59"), "51, 69, 59", 0, SAME),
        (_text("y = 4"), "y=4", 1, THEY_REFUSE),
        (_text("y = 4"), "x = 4", 0, SAME),
        (_text("y = 4"), "y = 44", 0, THEY_ACCEPT),
        (_text("BS"), "BS", 1, SAME),
        (_text("BS"), "SB", 1, THEY_REFUSE),
        (_text("BS"), r"\overline{SB}", 1, THEY_REFUSE),
        (_text("BS"), "BC", 0, SAME),
        (_text("Q1"), "Q1", 1, SAME),
        (_text("Q1"), "1Q", 0, SAME),
        (_text("White"), "white", 1, THEY_REFUSE),
        (_text("Product C"), r"\text{Product C}", 1, SAME),
        (_text("Product C"), "Product D", 0, SAME),
        (_text("275"), "275", 1, SAME),
        (_text("275"), "572", 0, SAME),
        (_text("D"), "D", 1, SAME),
        (_text("Sunday"), "Monday", 0, SAME),
    ],
    "wemath": [
        (_WE, "B", 1, SAME),
        (_WE, "B. 45°", 1, SAME),
        (_WE, "45°", 1, THEY_REFUSE),
        (_WE, "C", 0, SAME),
        (_WE, "E", 0, SAME),
        (_WE | {"option": "A. E; B. F", "answer": "A"}, "E", 0, SAME),
        (_WE | {"option": "A. 30;B．45;C. 60;D. none"}, "B", 1, SAME),
        (_WE | {"option": "A. 30;B．45;C. 60;D. none"}, "45", 1, THEY_REFUSE),
        (_WE | {"option": "A. to ;C.; B. from ;C.; C. none"}, "B", 1, SAME),
        (_WE, "", 0, SAME),
    ],
    "logicvista": [
        (_logic("C"), "C", 1, SAME),
        (_logic("C"), "c", 1, SAME),
        (_logic("C"), "D", 0, SAME),
        (_logic("C"), "B, C", 0, SAME),
        (_logic("A, C"), "A, C", 1, SAME),
        (_logic("A, C"), "C and A", 1, SAME),
        (_logic("A, C"), "A", 0, SAME),
        (_logic("A, C"), "A, B, C", 0, SAME),
        (_logic("3"), "3", 1, SAME),
        (_logic("3"), "C", 0, SAME),
        (_logic("C"), "", 0, SAME),
    ],
    "mathvista": [
        (ROWS["mathvista"][0], "14", 1, SAME),
        (ROWS["mathvista"][0], "14.0", 1, SAME),
        (ROWS["mathvista"][0], "14.7", 0, THEY_ACCEPT),
        (ROWS["mathvista"][0], "15", 0, SAME),
        (ROWS["mathvista"][1], "0.6", 1, SAME),
        (ROWS["mathvista"][1], "0.62", 1, SAME),
        (ROWS["mathvista"][1], "0.66", 0, SAME),
        (ROWS["mathvista"][1], r"\frac{3}{5}", 1, THEY_REFUSE),
        (ROWS["mathvista"][2], "[2007, 2008]", 1, SAME),
        (ROWS["mathvista"][2], "[2007,2008]", 1, THEY_REFUSE),
        (ROWS["mathvista"][2], "[2008, 2007]", 0, SAME),
        (ROWS["mathvista"][3], "B", 1, SAME),
        (ROWS["mathvista"][3], "(B)", 1, SAME),
        (ROWS["mathvista"][3], "8/11", 1, SAME),
        (ROWS["mathvista"][3], "A", 0, SAME),
        (_TWO, "B", 1, SAME),
        (_TWO, "C", 1, SAME),  # the same text
        (_TWO, "A", 0, SAME),
        (_LABELLED, "E", 1, SAME),
        (_LABELLED, "(b)", 0, SAME),  # option B, which is `(a)`
    ],
    "mathverse": [
        (mathverse_row(1, "B", _CHOICES), "B", 1, SAME),
        (mathverse_row(1, "B", _CHOICES), "45°", 1, SAME),
        (mathverse_row(1, "B", _CHOICES), "C", 0, SAME),
        (mathverse_row(1, "(C)", _CHOICES), "C", 1, SAME),
        (mathverse_row(1, "A\nC", _CHOICES), "A, C", 1, SAME),
        (mathverse_row(1, "A\nC", _CHOICES), "C and A", 1, SAME),
        (mathverse_row(1, "A\nC", _CHOICES), "A", 0, SAME),
        (mathverse_row(1, r"Area $=9.4 \mathrm{~cm}^{2}$"), "9.4", 1, SAME),
        (mathverse_row(1, r"Area $=9.4 \mathrm{~cm}^{2}$"), "9.40", 1, SAME),
        (mathverse_row(1, r"Area $=9.4 \mathrm{~cm}^{2}$"), "9.5", 0, SAME),
        (mathverse_row(1, r"$x^{2}+y^{2}=49$"), "x^2+y^2=49", 1, SAME),
        (mathverse_row(1, r"$x^{2}+y^{2}=49$"), "x^2+y^2=7", 0, SAME),
    ],
    "scienceqa": [
        (_SCIENCE, "B", 1, SAME),
        (_SCIENCE, "A", 0, SAME),
        (_SCIENCE, "D", 0, SAME),
        (_SCIENCE, "a bat", 1, THEY_REFUSE),
    ],
    "mmmu": [
        (ROWS["mmmu"][0], "B", 1, SAME),
        (ROWS["mmmu"][0], "(B)", 1, SAME),
        (ROWS["mmmu"][0], "A", 0, SAME),
        (_open("8.4"), "8.4", 1, SAME),
        (_open("8.4"), "8.404", 1, SAME),
        (_open("8.4"), "8.41", 0, SAME),
        (_open("0.9965"), "1.00", 1, SAME),
        (_open("2000000"), "2,000,000", 1, SAME),
        (_open("1/64"), "1/64", 1, SAME),
        (_open("1/64"), "1/46", 0, SAME),
        (_open("['Tampa', 'Florida']"), "Florida", 1, SAME),
        (_open("['Tampa', 'Florida']"), "florida", 1, SAME),
        (_open("['Tampa', 'Florida']"), "not Florida", 0, THEY_ACCEPT),
        (_open("embryonic"), "Embryonic", 1, SAME),
        (_open("embryonic"), "adult", 0, SAME),
    ],
    "mmbench": [
        (_CIRCULAR, "B", 1, SAME),
        (_CIRCULAR, "B. dog", 1, SAME),
        (_CIRCULAR, "dog", 1, SAME),
        (_CIRCULAR, "C", 0, SAME),
        (_CIRCULAR, "D", 0, SAME),
        (_CIRCULAR, "owl", 0, SAME),
    ],
    "mmstar": [
        (_STAR, "B", 1, SAME),
        (_STAR, "(B) a red car", 1, SAME),
        (_STAR, "Option B", 1, SAME),
        (_STAR, "A", 0, SAME),
        (_STAR, "a red car", 1, THEY_REFUSE),
        (mmstar_row(1, "Hint.\nWhich?\nChoices:\n(A) 4\n(B) 8\n(C) nan\n(D) nan", "B"), "8", 1, THEY_REFUSE),
        (mmstar_row(1, "Hint.\nWhich?\nChoices:\n(A) 4\n(B) 8\n(C) nan\n(D) nan", "B"), "C", 0, SAME),
    ],
    "gsm8k": [
        (_GRAMS, "1250", 1, SAME),
        (_GRAMS, "1,250", 1, SAME),
        (_GRAMS, "1250.00", 1, THEY_REFUSE),
        (_GRAMS, r"\$1250", 1, THEY_REFUSE),
        (_GRAMS, "125", 0, SAME),
        (_GRAMS, "-1250", 0, SAME),
    ],
    "math500": [
        (ROWS["math500"][0], r"\left(3,\frac{\pi}{2}\right)", 1, SAME),
        (ROWS["math500"][0], r"\left(\frac{\pi}{2}, 3\right)", 0, SAME),
        (ROWS["math500"][1], r"\frac{3}{4}", 1, SAME),
        (ROWS["math500"][1], r"\dfrac{3}{4}", 1, SAME),
        (ROWS["math500"][1], "0.75", 1, SAME),
        (ROWS["math500"][1], r"\frac{4}{3}", 0, SAME),
    ],
    "geo3k": [
        (ROWS["geo3k"][0], r"6\sqrt{3}", 1, SAME),
        (ROWS["geo3k"][0], r"6\sqrt{2}", 0, SAME),
        (ROWS["geo3k"][1], "48", 1, SAME),
        (ROWS["geo3k"][1], r"48^\circ", 1, SAME),
        (ROWS["geo3k"][1], "84", 0, SAME),
    ],
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_scores_beside_the_authors(name):
    benchmark, theirs = BENCHMARKS[name], RULES[name]
    found, expected = [], []
    for i, (row, answer, right, verdict) in enumerate(CASES[name]):
        ours = benchmark.score(benchmark.to_problem(row, i), rf"\boxed{{{answer}}}").correct
        found.append((answer, ours, theirs(row, answer)))
        expected.append((answer, float(right), bool(right) if verdict == SAME else verdict == THEY_ACCEPT))
    assert found == expected
    assert {right for _, _, right, _ in CASES[name]} == {0, 1}


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=5), st.data())
def test_lists_of_dynamath_have_an_order(numbers, data):
    """Any notation of the list is right, and no other order of it."""
    gold = data.draw(st.sampled_from(["[{}]", "({})", "{}"])).format(", ".join(map(str, numbers)))
    shuffled = data.draw(st.permutations(numbers))
    form = data.draw(st.sampled_from(["[{}]", "({})", "{}", r"\left({}\right)", r"$({})$", r"\left[{}\right]"]))
    answer = form.format(data.draw(st.sampled_from([",", ", ", r",\ "])).join(map(str, shuffled)))
    assert is_same_text(answer, gold) == (shuffled == numbers)
    assert not is_same_text(rf"\{{{', '.join(map(str, numbers))}\}}", gold)
    assert not is_same_text(", ".join(map(str, [*numbers, 1])), gold)


@given(st.sampled_from(MONTHS), st.sampled_from(MONTHS))
def test_months_of_dynamath(month, other):
    for answer in (other, other[:3], other.upper(), rf"\text{{{other}}}"):
        assert is_same_text(answer, month[:3]) == (month == other)
