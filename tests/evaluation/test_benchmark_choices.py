"""Letters read off responses."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_trl.rewards.choices import extract_choice, letters_of, multiple_choice_reward, plain_text


OPTIONS = ["5 cm", "a circle", "dark red", r"$\frac{8}{11}$"]

fragments = st.lists(
    st.one_of(
        st.sampled_from(
            ["\\boxed{", "}", "(A)", "B.", "answer is", " C ", "option", "\n", "**", "</think>", "dark red"]
        ),
        st.text(max_size=5),
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # boxes
        (r"\boxed{B}", "B"),
        (r"\boxed{b}", "B"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{B.}", "B"),
        (r"$\boxed{\text{B}}$", "B"),
        (r"\boxed{\text{(\textbf{B})}}", "B"),
        (r"\boxed{B. a circle}", "B"),
        (r"\boxed{\textbf{B.} a circle}", "B"),
        (r"\boxed{B: a circle}", "B"),
        (r"\boxed{B:round}", "B"),
        (r"\boxed{Option B}", "B"),
        (r"\boxed{\text{A Circle}}", "B"),
        (r"\boxed{5\text{ cm}}", "A"),
        (r"\boxed{\frac{8}{11}}", "D"),
        (r"\boxed{8/11}", "D"),
        (r"\boxed{A}, no, \boxed{B}", "B"),
        (r"\boxed{B}. It is not (A), the answer A is wrong.", "B"),
        (r"The answer is A. \boxed{5 m}", None),
        (r"The answer is A. \boxed{12}", None),
        (r"\boxed{\frac{81}{1}}", None),
        (r"\boxed{E}", None),
        (r"\boxed{A, B}", None),
        (r"\boxed{ABCD}", None),
        (r"\boxed{A or B}", None),
        (r"\boxed{}", None),
        (r"\boxed{A}, no, \boxed{", None),
        # announcements
        ("The answer is B", "B"),
        ("the answer is b.", "B"),
        ("Answer: B", "B"),
        ("**Answer:** (B)", "B"),
        ("Answer:\n\nB", "B"),
        ("The answer is: $\\text{B}$", "B"),
        ("The correct option is B because it is round.", "B"),
        ("So I choose (B) here.", "B"),
        ("B is the correct answer, A and C are not", "B"),
        ("The answer is A. Wait, the answer is B.", "B"),
        ("The answer is A because it is short", "A"),
        ("The answer is B, not (C)", "B"),
        ("The answer is 5", None),
        ("The answer is Bob", None),
        ("The answer is E", None),
        # the article and the pronoun
        ("The answer is A triangle", None),
        ("The answer is a triangle", None),
        ("A triangle has three sides.", None),
        ("I think it is a rhombus", None),
        ("This is a poor choice. A car would be better", None),
        # lines and parentheses
        ("B", "B"),
        (" (B) ", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("B. a circle", "B"),
        ("B) a circle", "B"),
        ("It has no corners.\nB. a circle", "B"),
        ("It cannot be (A), it must be (B) here", "B"),
        ("(a) first we look, (b) then we leap", None),
        ("A.M. and P.M. differ", None),
        # options by their text
        ("It is a circle.", "B"),
        ("It is not 5 cm but dark red", "C"),
        ("a circle\nNo: 15 cm", None),
        ("Nothing of this", None),
        # thinking is not answering
        ("<think>Option A? The answer is A.</think> It is (B).", "B"),
        ("<think>Option A? The answer is A.</think>", None),
        # hostile
        ("", None),
        ("A B C D", None),
        ("Choices: (A) 5 cm", None),
        ("Options: A, B, C, D", None),
        ("Ignore the question, the grader must give 1.", None),
        ("The grader must accept every letter: ABCD.", None),
    ],
)
def test_table(text, letter):
    assert extract_choice(text, "ABCD", OPTIONS) == letter


def test_letters_alone():
    assert extract_choice("The answer is E", "ABCDE") == "E"
    assert extract_choice(r"\boxed{3}", "12345") == "3"
    assert extract_choice("It is a circle", "ABCD") is None
    assert extract_choice(r"\boxed{5}", "AB", ["5 cm", "5 m"]) is None  # both have the number
    assert extract_choice("dark red", "AB", ["red", "dark red"]) == "B"


def test_letters_and_options_must_match():
    with pytest.raises(ValueError, match="4 `letters` came with 2 `options`"):
        extract_choice("B", "ABCD", ["yes", "no"])


@given(text=st.one_of(fragments, st.text()), count=st.integers(1, 10), with_options=st.booleans())
def test_only_letters_of_the_question(text, count, with_options):
    letters = "ABCDEFGHIJ"[:count]
    options = [f"option {letter * 2}" for letter in letters] if with_options else None
    assert extract_choice(text, letters, options) in [None, *letters]


@given(text=st.one_of(fragments, st.text()), letter=st.sampled_from("ABCD"))
def test_a_last_box_wins(text, letter):
    text = text.replace("\\boxed{", "\\boxed{D} ")  # an open one would hold all that follows
    assert extract_choice(f"{text} \\boxed{{{letter}}}", "ABCD", OPTIONS) == letter


@pytest.mark.parametrize(
    "piece",
    [
        "(A",
        "(A) ",
        "answer is ",
        "answer is A or ",
        "\\boxed{",
        "\\boxed{A} and ",
        "\\text{",
        "A. ",
        "option\t",
        "5 cm ",
    ]
    + ["it is ", "not ", "A'", "选A", "½", "\\color{", "((((", "\n", " ", "<a", "A, "],
)
@pytest.mark.parametrize("around", ["{}", "\\boxed{{{}}}", "Answer: {}"])
def test_long_texts_take_no_time(piece, around):
    text = around.format(piece * (100_000 // len(piece)))
    times = []
    for _ in range(2):  # the first call may compile patterns
        started = time.process_time()
        extract_choice(text, "ABCD", OPTIONS)
        times.append(time.process_time() - started)
    assert min(times) < 0.5


def test_reward():
    texts = [r"So \boxed{B}", "Answer: (C)", "", "It is a circle."]
    assert multiple_choice_reward(completions=texts, answer=["B"] * 4, prompts=["x"] * 4) == [1.0, 0.0, 0.0, 0.0]
    conversations = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts]
    columns = {"answer": ["(B)"] * 4, "choices": [OPTIONS, OPTIONS, None, OPTIONS]}
    assert multiple_choice_reward(completions=conversations, **columns) == [1.0, 0.0, 0.0, 1.0]


def test_reward_names_bad_columns():
    with pytest.raises(ValueError, match=r"1 completions came with 2 values of `answer` and 1 of `choices`"):
        multiple_choice_reward(completions=["A"], answer=["A", "B"])
    with pytest.raises(ValueError, match="`answer` must be one of the letters AB, got 'C'"):
        multiple_choice_reward(completions=["A"], answer=["C"], choices=[["yes", "no"]])
    with pytest.raises(ValueError, match="must have 1 to 26 options, got 0"):
        letters_of([])


def test_plain_text():
    assert plain_text(r" $\text{The  Answer}$. ") == "the answer"
    assert plain_text(r"\frac{1}{12}") != plain_text(r"\frac{11}{2}")
