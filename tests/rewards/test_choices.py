"""Which letter a response chooses: kinds of sentences and boxes, generated."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo_trl.rewards import multiple_choice_reward
from sapo_trl.rewards.choices import extract_choice


LETTERS = "ABCD"
COLOURS = ["red", "dark red", "blue", "no"]

letters = st.sampled_from(LETTERS)
two_letters = st.permutations(LETTERS).map(lambda order: order[:2])

# Each names one letter, at `X`.
ANNOUNCEMENTS = [
    "X",
    "(X)",
    "X.",
    "**X**",
    "The answer is X",
    "The answer is (X) 12 cm.",
    "So the answer must be X, since the angles are equal.",
    "Answer: X",
    "answer - 'X'",
    "**Answer:** (X)",
    "### Final Answer\n\nX",
    "Answer: X\n\nThe others are too large.",
    "the correct option is: X",
    "The correct choice is **X**: 45°.",
    "My answer, then, is X.",
    "Answer: I think it is X",
    "X is the correct answer.",
    "Therefore, option X is right.",
    "We get 12, which is option X.",
    "I would choose X.",
    "It is not true for odd numbers, so I go with X.",
    "There is no doubt that the answer is X.",
    "X. 12 cm\n\nExplanation: it is the sum.",
    "__X__",
    "_X_",
    "Answer: __X__",
    "(E) contradicts the text; the answer is (X)",
    "The answer is X, since E fails.",
    "The answer is (X) No.",
    "Answer: X. False",
    "X. False",
    "Answer: (X) Incorrect",
    "X, because the rest is wrong",
    "X) because of the angle",
    "<answer>X</answer>",
    "<think>(A)? No, (B). Or C?</think>\nX",
    '{"answer": "X"}',
    "Hence (X).",
    "Answer: X\n\nExplanation: (E) says that 12 is odd, which is incorrect.",
    "The correct answer is X. The others are wrong.",
    "答案是X。",
    "答案：（X）",
    "故选：X",
    "所以选X",
    "因此选择 X 选项。",
    "【答案】X",
    "選 X",
    "X选项正确",
    "答えはXです",
    "정답은 X입니다",
    "La respuesta correcta es la X.",
    "La bonne réponse est la X.",
    "Die richtige Antwort ist X.",
    "A resposta correta é X.",
    "La risposta corretta è X.",
    "Правильный ответ: X.",
    "Cevap: X",
    "Đáp án: X",
]

# Each names a letter, at `X`, and does not choose it.
NOT_CHOSEN = [
    # negated
    "It cannot be (X)",
    "The answer is not X",
    "The answer isn't (X).",
    "The answer can't be X, since 12 is even.",
    "The answer is definitely not X",
    "I would not choose X",
    "You should never pick X",
    "don't select X",
    "Not X.",
    "I would eliminate X.",
    "I rule out option X.",
    "Option X is wrong because the base is 4.",
    "X is the wrong answer.",
    "The incorrect option is X.",
    "I do not believe X is correct",
    "There is no way the answer is X",
    "Everything except X is correct",
    "The answer is anything but X",
    "The answer X is too small",
    "(X) fails",
    "(X) can be ruled out.",
    "(X) can be eliminated",
    "(X) has been excluded.",
    "(X) is a distractor.",
    "(X) contradicts the text.",
    "(X) violates the second condition",
    "(X) does not hold.",
    "(X) lacks evidence",
    "(X) misreads the graph",
    "(X) conflicts with the figure",
    "(X) never happens",
    "(X) only if x > 0",
    "(X), on the other hand, is wrong",
    "(X) → contradiction",
    "(X) ✗",
    "(X) almost works",
    "X\n\nActually E",
    "(X) out",
    "(X) equals 5",
    "Option (X) contradicts the text",
    "Option X: false",
    "X: not possible",
    "~~X~~",
    "X#",
    "<thinking>Answer: X</thinking>",
    "<THINK>The answer is X</THINK>",
    # left open
    "Not sure, maybe X.",
    "The answer could be X",
    "Perhaps the answer is X",
    "Answer: X?",
    "Is the answer X?",
    "If the answer is X, then x = 3.",
    "Suppose the answer is X.",
    "Some say the answer is X.",
    "The student thinks the answer is X",
    "Consider option X.",
    "Looking at (X) it is small, and therefore I need to",
    # taken back
    "The answer is X. Wait, that is wrong.",
    "The answer is X. The answer is not X.",
    "Some say the answer is X, but that is a mistake.",
    # no label
    "Triangle X lies on it.",
    "The answer is X = 5",
    "The answer is X2.",
    "The answer is X'",
    "The answer is X^2",
    "Vitamin X",
    # other languages
    "答案不是X",
    "不选X",
    "排除X",
    "选项X是错误的",
    "X不正确",
    "如果答案是X，则无解",
    "正解はXではありません",
    "답은 X가 아닙니다",
    "La respuesta no es X.",
    "La réponse n'est pas X.",
    "Die Antwort ist nicht X.",
    "A resposta não é X",
    "La risposta non è X",
    "Ответ не X",
    "Svaret är inte X",
]

# Each names two letters, and chooses none.
TWO = [
    "The answer is X or Y",
    "The answer is (X) or (Y).",
    "The answer is either X or Y",
    "Answer: X, Y",
    "Answer: X & Y",
    "Answer: X/Y",
    "Answer: (X)(Y)",
    "Answer: X and Y are correct.",
    "Answer: XY",
    "Answer: (X) 3 (Y) 4",
    "Answer: X (or Y)",
    "Answer: X > Y",
    "Answer: X = Y",
    "X or Y is the correct answer.",
    "Both X and Y are correct.",
    "Neither X nor Y.",
    "X\nY",
    "X. 12\nY. 13",
    "(X) 12 (Y) 13",
    "Which is right, (X) or (Y)?",
    "Option X is too small, and option Y is too large.",
    "I eliminated (X) and (Y)",
    "答案：X、Y",
    "选X或Y",
    "X和Y都对",
    "答案是X还是Y？",
    "Antwort: X oder Y",
    "Respuesta: X o Y",
    "Réponse: X ou Y",
    r"\boxed{X} or \boxed{Y}",
]

BOXED = [
    "X",
    "(X)",
    "X.",
    "{X}",
    r"\{X\}",
    "[X]",
    "'X'",
    "X:",
    "X)",
    "X、12",
    "X.12",
    "X: 12",
    "(X)12",
    "X - 12",
    "Option X",
    "The answer is X",
    "X, not E",
    "选项X",
    "答案：X",
    "X选项",
    "（X）",
    r"X\ ",
    r"\left(X\right)",
    r"\large X",
    r"\bf X",
    r"\color{red}{X}",
    "$X$",
    "**X**",
    "X. There is no solution",
]
BOXED_NONE = [
    "not X",
    "X is wrong",
    "(X) wrong",
    "(X) not right",
    "X. not correct",
    "maybe X",
    "except X",
    r"\neg X",
    r"\neq X",
    r"\overline{X}",
    "X'",
    "X_1",
    "X = 3",
    "X Y",
    "XY",
    "X, Y",
    "X or Y",
    "X/Y",
    "X-Y",
    "(X)(Y)",
    "X. Y.",
    "X and Y",
    r"X \lor Y",
    r"X \cup Y",
    "X > Y",
    "X to Y",
    "neither X nor Y",
    "either X or Y",
    "X或Y",
    "不是 X",
    "nicht X",
]
FONTS = ["text", "textbf", "mathrm", "mathbf", "texttt", "textsf", "boldsymbol", "underline", "mathit", "mbox"]


def filled(text: str, *chosen: str) -> str:
    for name, letter in zip("XY", chosen, strict=False):
        text = text.replace(name, letter)
    return text


@pytest.mark.parametrize("text", ANNOUNCEMENTS)
@pytest.mark.parametrize("letter", LETTERS)
def test_announced(text, letter):
    assert extract_choice(filled(text, letter), LETTERS) == letter


@pytest.mark.parametrize("text", NOT_CHOSEN)
@pytest.mark.parametrize("letter", LETTERS)
def test_named_and_not_chosen(text, letter):
    assert extract_choice(filled(text, letter), LETTERS) is None


@given(text=st.sampled_from(TWO), both=two_letters)
def test_two_letters_are_none(text, both):
    assert extract_choice(filled(text, *both), LETTERS) is None


@given(text=st.sampled_from(BOXED), letter=letters, fonts=st.lists(st.sampled_from(FONTS), max_size=2))
def test_boxed(text, letter, fonts):
    box = filled(text, letter)
    for font in fonts:
        box = rf"\{font}{{{box}}}"
    assert extract_choice(rf"So \boxed{{{box}}}.", LETTERS) == letter


@given(text=st.sampled_from(BOXED_NONE), both=two_letters, font=st.sampled_from(["", r"\text", r"\mathrm"]))
def test_boxed_and_not_chosen(text, both, font):
    box = filled(text, *both)
    assert extract_choice(rf"\boxed{{{font}{{{box}}}}}" if font else rf"\boxed{{{box}}}", LETTERS) is None


@given(text=st.sampled_from(ANNOUNCEMENTS), letter=letters)
def test_full_width(text, letter):
    wide = chr(ord(letter) + 0xFEE0)
    assert extract_choice(filled(text, wide), LETTERS) == letter


@given(text=st.sampled_from(ANNOUNCEMENTS + BOXED), letter=letters)
def test_thinking_that_never_ends(text, letter):
    assert extract_choice(f"<think>{filled(text, letter).replace('</think>', '')}", LETTERS) is None


@given(chosen=st.sampled_from(ANNOUNCEMENTS[4:10]), denied=st.sampled_from(NOT_CHOSEN[:8]), both=two_letters)
def test_another_letter_may_be_denied(chosen, denied, both):
    right, wrong = both
    assert extract_choice(f"{filled(denied, wrong)}\n{filled(chosen, right)}", LETTERS) == right
    assert extract_choice(f"{filled(chosen, right)}\n{filled(denied, wrong)}", LETTERS) == right


@given(both=two_letters)
def test_the_last_announcement_counts(both):
    first, last = both
    assert extract_choice(f"The answer is {first}. Hmm, the answer is {last}.", LETTERS) == last
    assert extract_choice(f"ANSWER: {first} ... actually, ANSWER: {last}", LETTERS) == last
    assert extract_choice(f"The answer was {first}, but now the answer is {last}", LETTERS) == last
    assert extract_choice(f"The answer is {first}... no, {last}.", LETTERS) != first
    assert extract_choice(f"The answer was {first}, but now it's {last}", LETTERS) != first


def test_a_letter_that_is_no_option():
    assert extract_choice("The answer is E", LETTERS) is None
    assert extract_choice("The answer is A. No, the answer is E.", LETTERS) is None
    assert extract_choice(r"The answer is A. \boxed{E}", LETTERS) is None


@pytest.mark.parametrize(
    "text",
    ["I am sure.", "The answer is I think unclear", "Answer: I don't know", "Answer: a few", "Answer: A lot of them"]
    + [
        "A few of them",
        "The answer is a matter of taste",
        r"\boxed{\text{I don't know}}",
        "ANSWER: None of the above",
    ],
)
def test_articles_and_pronouns(text):
    assert extract_choice(text, "ABCDEFGHIJ") is None


def test_a_formula_in_the_box_is_a_step_where_options_are_unknown():
    text = r"**Answer: D**, where \boxed{\langle H\rangle \ll \Delta E}"
    assert extract_choice(text, "ABCDE") == "D"
    assert extract_choice(text, "ABCDE", ["1", "2", "3", "4", "5"]) is None
    assert extract_choice(r"Answer: D \boxed{}", LETTERS) == "D"
    assert extract_choice(r"Answer: D \boxed{\text{or not}}", LETTERS) is None


class TestOptions:
    @pytest.mark.parametrize(
        "text",
        [
            "I cannot answer with yes or no",
            "Sorry, I can't help with that, no image is given.",
            "No image was provided.",
        ]
        + [
            "I'm unable to view the image, so there is no way for me to tell.",
            "No, I cannot see the image.",
            "no idea",
        ]
        + [
            "Without the figure, no answer can be given.",
            "There is no data.",
            "I can't say yes.",
            "The answer is not yes.",
        ]
        + [
            "It is impossible to say yes or no here.",
            "No one knows whether it is yes.",
            "Yes or no?",
            "yes and no",
            "None",
        ],
    )
    def test_refusals(self, text):
        assert extract_choice(text, "AB", ["Yes", "No"]) is None

    @pytest.mark.parametrize(
        ("text", "letter"),
        [
            ("Yes, there is no doubt.", "A"),
            ("Yes - it is.", "A"),
            ("No, it is not symmetric.", "B"),
            ("No, yes would be wrong.", "B"),
            ("No, wait, yes.", None),
            ("The answer is 'no'.", "B"),
            (r"\boxed{\text{No.}}", "B"),
        ],
    )
    def test_yes_and_no(self, text, letter):
        assert extract_choice(text, "AB", ["Yes", "No"]) == letter

    @pytest.mark.parametrize(
        "frame",
        ["{}", "It is {}.", "The ball is {}!", "The answer is {}", "Answer: {}", "**{}**", "It is {}, not green."]
        + [
            r"\boxed{{{}}}",
            r"\boxed{{\text{{{}}}}}",
            r"\boxed{{\textbf{{ {}.}}}}",
            "So the colour is {} because it shines.",
        ],
    )
    @pytest.mark.parametrize("number", range(4))
    def test_stated(self, frame, number):
        assert extract_choice(frame.format(COLOURS[number]), LETTERS, COLOURS) == LETTERS[number]

    @pytest.mark.parametrize(
        "frame",
        ["It is not {}.", "It isn't {}", "It is never {}", "It is anything but {}", "It could be {}", "Is it {}?"]
        + ["I can't tell whether it is {}.", "Nothing is {} here", "If it is {}, then x = 3"]
        + [r"\boxed{{\text{{not {}}}}}", r"\boxed{{\text{{neither {}}}}}", r"\boxed{{un{}}}", r"\boxed{{{}dish}}"],
    )
    @pytest.mark.parametrize("number", range(3))
    def test_not_stated(self, frame, number):
        assert extract_choice(frame.format(COLOURS[number]), LETTERS, COLOURS) is None

    @given(
        both=st.permutations(COLOURS[:3]).map(lambda order: order[:2]), joint=st.sampled_from([" or ", " and ", ", "])
    )
    def test_two_texts(self, both, joint):
        text = joint.join(both)
        for answer in (text, f"It is {text}.", rf"\boxed{{\text{{{text}}}}}"):
            assert extract_choice(answer, LETTERS, COLOURS) is None

    @given(
        options=st.lists(
            st.from_regex(r"[a-z]{3,8}( [a-z]{3,8})?", fullmatch=True), min_size=4, max_size=4, unique=True
        ),
        number=st.integers(0, 3),
    )
    def test_any_text_in_a_box(self, options, number):
        box = options[number]
        assert extract_choice(rf"\boxed{{\text{{{box}}}}}", LETTERS, options) == LETTERS[number]
        assert extract_choice(rf"\boxed{{{LETTERS[number]}. {box}}}", LETTERS, options) == LETTERS[number]
        other = LETTERS[(number + 1) % 4]
        assert extract_choice(rf"\boxed{{{other}. {box}}}", LETTERS, options) is None  # the letter or the text?

    @pytest.mark.parametrize("box", ["", " ", r"\text{}", ".", r"\ ", "{}"])
    def test_empty_boxes(self, box):
        assert extract_choice(rf"\boxed{{{box}}}", LETTERS, ["", "...", "$ $", "x"]) is None

    @pytest.mark.parametrize(
        ("box", "options", "letter"),
        [
            ("12", ["12", "13"], "A"),
            ("12.0", ["12", "13"], "A"),
            ("12", ["12 cm", "13 cm"], "A"),
            ("60^\\circ", ["30", "60"], "B"),
            ("0.12", ["12%", "13%"], "A"),
            (r"12\%", ["12", "0.12"], "B"),
            ("y=2x+1", ["y = 2x + 1", "y = x"], "A"),
            (r"x^{2}", ["x²", "x2"], "A"),
            ("8", ["2³", "23"], "A"),
            ("ab", ["AB", "ab"], "B"),
            (r"x \geq 2", ["x ≥ 2", "x > 2"], "A"),
            (r"x \le 2", ["x ≥ 2", "x ≤ 2"], "B"),
            ("x >= 2", ["x > 2", "x ≥ 2"], "B"),
            (r"x > 2", ["x ≥ 2", "x > 2"], "B"),
            (r"x \leqslant 2", ["x < 2", "x ≥ 2"], None),
            (r"x \ngeq 2", ["x ≥ 2", "x < 2"], None),
            ("Blue", ["blue", "red"], "A"),
            (r"12\%", ["12", "13"], None),
            ("12 cm", ["12 m", "13 m"], None),
            ("12", ["12 kg", "12 g"], None),
            ("30 = 60", ["30°", "60°"], None),
            ("> 12", ["12", "13"], None),
            ("12 or 13", ["12", "13"], None),
            ("-12", ["12", "13"], None),
            ("12^2", ["12", "13"], None),
            (r"12\text{ million}", ["12", "13"], None),
            ("aB", ["AB", "ab"], None),
        ],
    )
    def test_formulas_and_numbers(self, box, options, letter):
        assert extract_choice(rf"\boxed{{{box}}}", "AB", options) == letter

    @pytest.mark.parametrize(
        "text", ["I have 2 reasons to doubt it", "Step 2", "There are 3 reasons", "2 or 3", "not 3"]
    )
    def test_numbers_that_count_something_else(self, text):
        assert extract_choice(text, LETTERS, ["1", "2", "3", "4"]) is None

    def test_a_letter_in_the_text_of_an_option(self):
        points = ["Point A", "Point C", "Point B", "Point D"]
        assert extract_choice("The answer is Point B.", LETTERS, points) == "C"
        assert extract_choice(r"\boxed{Point B}", LETTERS, points) == "C"
        assert extract_choice(r"\boxed{B}", LETTERS, ["C", "A", "B", "D"]) == "B"


def test_rows_without_an_answer():
    completions = [r"\boxed{B}", r"\boxed{B}", "no box"]
    assert multiple_choice_reward(completions=completions, answer=["B", None, None]) == [1.0, None, None]
