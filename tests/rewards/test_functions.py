r"""What `accuracy_reward` makes of answers, by hand; how completions are read; how trainers call it."""

import pickle
import subprocess
import sys
import time

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward as trl_accuracy_reward

import sapo_trl.rewards
from sapo_trl.rewards import accuracy_reward
from sapo_trl.rewards.completion import answer_part, completion_text, last_boxed
from sapo_trl.rewards.equivalence import MAX_LENGTH, Verdict, are_equivalent, is_equivalent
from sapo_trl.rewards.notation import as_latex, without_spaces
from tests.testing_utils import logged, text_dataset


EQUAL, DIFFERENT, UNPARSED = Verdict.EQUAL, Verdict.DIFFERENT, Verdict.UNPARSED

# (answer, gold, verdict), each judged by hand. Where one may judge otherwise, a comment says what rules.
TABLE = {
    "integers": [
        ("12", "12", EQUAL),
        (" 12 ", "12", EQUAL),
        ("012", "12", EQUAL),
        ("+12", "12", EQUAL),
        ("-12", "12", DIFFERENT),
        ("13", "12", DIFFERENT),
        ("112", "12", DIFFERENT),
        ("−12", "-12", EQUAL),  # U+2212
        ("１２", "12", EQUAL),  # full width
        ("12.", "12", EQUAL),
        ("=12", "12", EQUAL),
        (r"\text{12}", "12", EQUAL),
        (r"\mathbf{12}", "12", EQUAL),
        ("$12$", "12", EQUAL),
        (r"\(12\)", "12", EQUAL),
        ("1234567890123456789", "1234567890123456788", DIFFERENT),
    ],
    "thousands": [
        ("1,000", "1000", EQUAL),
        ("1{,}000", "1000", EQUAL),
        ("12 000 000", "12000000", EQUAL),
        (r"12\,000", "12{,}000", EQUAL),
        ("1,000.5", "1000.5", EQUAL),
        ("1,00", "100", DIFFERENT),  # no separator of thousands: the set {1, 0}
        ("1.000", "1000", DIFFERENT),  # the dot is a decimal point
    ],
    "fractions and decimals": [
        (r"\frac{1}{2}", "0.5", EQUAL),
        (r"\frac12", "0.5", EQUAL),
        (r"\dfrac{2}{4}", r"\frac{1}{2}", EQUAL),  # unreduced, which some benchmarks forbid
        ("1/2", r"\frac{1}{2}", EQUAL),
        (r"-\frac{1}{2}", r"\frac{-1}{2}", EQUAL),
        ("½", "0.5", EQUAL),
        (r"\frac{2}{1}", "0.5", DIFFERENT),
        (r"1\frac{1}{2}", r"\frac{3}{2}", EQUAL),
        ("1 1/2", r"\frac{3}{2}", EQUAL),
        ("3 1/2", "2", DIFFERENT),
        ("0.50", ".5", EQUAL),
        ("7.0", "7", EQUAL),
        ("0.333333", r"\frac{1}{3}", EQUAL),  # six places are enough
        ("0.33", r"\frac{1}{3}", DIFFERENT),
        ("3:4", r"\frac{3}{4}", EQUAL),
    ],
    "scientific": [
        (r"1.2 \times 10^3", "1200", EQUAL),
        (r"1.2\cdot 10^{3}", "1200", EQUAL),
        ("1.2e3", "1200", EQUAL),
        ("3.5E-4", "0.00035", EQUAL),
        ("1.2e3", "120", DIFFERENT),
        (r"9.8 \times 10^{5}", "980000", EQUAL),
        (r"1.6\times 10^{-19}", "1.6e-19", EQUAL),
        (r"1.7\times 10^{-19}", r"1.6\times 10^{-19}", DIFFERENT),
        (r"1.6\times 10^{-19}", "0", DIFFERENT),
    ],
    "roots, powers, constants": [
        (r"6\sqrt{3}", r"6 \sqrt { 3 }", EQUAL),
        ("3", r"6 \sqrt { 3 }", DIFFERENT),
        (r"2\sqrt{221}", r"\sqrt{884}", EQUAL),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", EQUAL),
        ("6√3", r"6\sqrt{3}", EQUAL),
        ("√(3)", r"\sqrt{3}", EQUAL),
        (r"\sqrt(3)", r"\sqrt{3}", EQUAL),
        ("√12", r"2\sqrt{3}", EQUAL),
        (r"\sqrt[3]{8}", "2", EQUAL),
        ("2^{10}", "1024", EQUAL),
        ("3²", "9", EQUAL),
        (r"2\pi", "6.283185", EQUAL),
        ("2π", r"2 \pi", EQUAL),
        ("6.28", r"2\pi", DIFFERENT),
        (r"\ln e", "1", EQUAL),
        ("5!", "120", UNPARSED),  # 120, or 5 with an exclamation mark
        ("2 \\cdot 5!", "240", EQUAL),
        ("120", "5!", EQUAL),
    ],
    "degrees and units": [
        (r"60^\circ", "60", EQUAL),
        ("60°", "60", EQUAL),
        (r"60^{\circ}", r"60^\circ", EQUAL),
        ("60 degrees", "60", EQUAL),
        (r"5\text{ cm}", "5", EQUAL),
        (r"5\,\mathrm{cm}^2", "5", EQUAL),
        ("5 cm", "5", EQUAL),
        (r"5~\text{m}", "5", EQUAL),
        (r"\$18", "18", EQUAL),
        ("$18", "18", EQUAL),
        (r"\text{3.5 cm}", "3.5", EQUAL),
        (r"\frac{\pi}{3}", r"60^\circ", DIFFERENT),  # degrees are not converted
    ],
    "percent": [
        (r"50\%", r"\frac{1}{2}", EQUAL),
        (r"50\%", "50", EQUAL),  # math-verify takes either reading
        (r"50\%", "5", DIFFERENT),
    ],
    "expressions": [
        ("3+2x", "2x+3", EQUAL),
        ("(x-2)(x-3)", "x^2-5x+6", EQUAL),
        ("(x-2)(x+3)", "x^2-5x+6", DIFFERENT),
        ("y+1", "x+1", DIFFERENT),
        ("a/(bc)", r"\frac{a}{bc}", EQUAL),
        ("a/bc", r"\frac{a}{bc}", DIFFERENT),  # or ac/b
        ("1/2x", r"\frac{x}{2}", DIFFERENT),
        ("1/2 \\cdot x", r"\frac{x}{2}", EQUAL),
        (r"\frac{1}{2}x", r"\frac{x}{2}", EQUAL),
        ("X+1", "x+1", DIFFERENT),  # two unknowns
    ],
    "equations": [
        ("x=60", "60", EQUAL),
        ("60", "x=60", EQUAL),
        ("x=60", "y=60", DIFFERENT),
        (r"m\angle A = 30^\circ", "30", EQUAL),
        ("13=12", "12", DIFFERENT),
        ("10+2=12", "12", EQUAL),
        ("12=13", "12", DIFFERENT),
        ("y=2x+1", "2x-y+1=0", EQUAL),
    ],
    "sets, tuples, intervals": [
        (r"\{2, 1\}", r"\{1,2\}", EQUAL),
        ("2,1", r"\{1,2\}", EQUAL),
        (r"1 \text{ or } 2", r"\{1,2\}", EQUAL),
        (r"\pm 3", r"\{-3, 3\}", EQUAL),
        ("(2,1)", "(1,2)", DIFFERENT),
        ("(1,2)", "1,2", EQUAL),  # a pair and a list of two
        (r"\left(\frac{1}{2}, 3\right)", "(0.5, 3)", EQUAL),
        ("（3，4）", "(3,4)", EQUAL),
        ("[1,2]", "(1,2)", DIFFERENT),
        (r"\left[0,1\right)", "[0, 1)", EQUAL),
        (r"(5,\infty)\cup(-\infty,3)", r"(-\infty,3)\cup(5,\infty)", EQUAL),
        (r"(-\infty,3)", "x<3", EQUAL),
        ("x<3", r"(-\infty,3)", EQUAL),
    ],
    "matrices": [
        (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", EQUAL),
        (r"\begin{pmatrix}1&2\\4&3\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", DIFFERENT),
        (r"\begin{pmatrix}1.0\\ \frac{4}{2}\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", EQUAL),
        (r"\begin{pmatrix}1\\[2pt]2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", EQUAL),
    ],
    "words": [
        (r"\text{yes}", "Yes", EQUAL),
        (r"\text{True}", "true", EQUAL),
        (r"\textbf{(C)}", "C", EQUAL),
        ("no", "yes", DIFFERENT),
        (r"\text{east}", r"\text{west}", DIFFERENT),
    ],
    "more than one answer": [
        ("12, 13", "12", DIFFERENT),
        (r"12 \text{ or } 13", "12", DIFFERENT),
        (r"12 \text{, not } 13", "12", DIFFERENT),
        (r"\{10, 11, 12, 13\}", "12", DIFFERENT),
        ("$12$ or $13$", "12", DIFFERENT),
        (r"12 \foo{", "12", UNPARSED),
        ("the answer is not $12", "12", DIFFERENT),
    ],
    "nothing": [
        ("", "12", UNPARSED),
        ("", "", UNPARSED),
        ("$$", "12", UNPARSED),
        (r"\frac{", "12", UNPARSED),
        (r"\ud800", "12", UNPARSED),
        ("\ud800", "12", UNPARSED),
        ("\x00", "12", UNPARSED),
        ("💥", "12", UNPARSED),
        ("1" * (MAX_LENGTH + 1), "12", UNPARSED),
        ("0", r"0.\overline{3}", DIFFERENT),  # math-verify's default reads the gold as 0
        (r"__import__('os').abort()", "12", DIFFERENT),  # words
    ],
    "gold in other forms": [
        ("12", 12, EQUAL),
        ("12", 12.0, EQUAL),
        (r"\frac{1}{2}", 0.5, EQUAL),
        ("0.00001", 1e-5, EQUAL),
        (r"10^{22}", 1e22, EQUAL),
        (r"6\sqrt{3}", r"$6 \sqrt { 3 }$", EQUAL),
        (r"6\sqrt{3}", r"$$6 \sqrt { 3 }$$", EQUAL),
        (r"6\sqrt{3}", r"\boxed{6 \sqrt { 3 }}", EQUAL),
        (r"6\sqrt{3}", r"$\boxed{6 \sqrt { 3 }}$.", EQUAL),
        (r"6\sqrt{3}", r"So the answer is \(\boxed{6 \sqrt { 3 }}\).", EQUAL),
        ("3", r"$\boxed{6 \sqrt { 3 }}$", DIFFERENT),
    ],
}
ROWS = [(kind, *row) for kind, rows in TABLE.items() for row in rows]


def test_the_table():
    _, answers, golds, expected = zip(*ROWS, strict=True)
    found = are_equivalent(answers, golds)
    wrong = [row + (verdict,) for row, verdict in zip(ROWS, found, strict=True) if verdict != row[3]]
    assert not wrong
    boxed = [rf"So \boxed{{{answer}}}." for answer in answers if r"\foo{" not in answer and answer != r"\frac{"]
    kept = [i for i, answer in enumerate(answers) if r"\foo{" not in answer and answer != r"\frac{"]
    rewards = accuracy_reward(completions=boxed, answer=[golds[i] for i in kept])
    assert rewards == [float(expected[i] is EQUAL) for i in kept]


# (answer, gold as data sets have it, ours, TRL's with the bare gold).
RAW_GOLDS = [
    (r"6\sqrt{3}", r"6 \sqrt { 3 }", 1.0, 0.0),
    ("3", r"6 \sqrt { 3 }", 0.0, 1.0),
    (r"2\sqrt{221}", r"2 \sqrt { 221 }", 1.0, 0.0),
    ("221", r"2 \sqrt { 221 }", 0.0, 1.0),
    (r"\sqrt{2}", r"\sqrt { 2 }", 1.0, 0.0),
    ("2", r"\sqrt { 2 }", 0.0, 1.0),
    (r"8\pi", r"8 \pi", 1.0, 0.0),
    ("8", r"8 \pi", 0.0, 1.0),
    (r"\frac{3}{2}\sqrt{5}", r"\frac { 3 } { 2 } \sqrt { 5 }", 1.0, 0.0),
    ("x+3", "x + 3", 1.0, 0.0),
    ("48", "48", 1.0, 1.0),
    ("47", "48", 0.0, 0.0),
]


def test_raw_gold_beside_trl():
    answers, golds, ours, trls = map(list, zip(*RAW_GOLDS, strict=True))
    boxed = [rf"\boxed{{{answer}}}" for answer in answers]
    assert accuracy_reward(completions=boxed, answer=golds) == ours
    messages = [[{"role": "assistant", "content": text}] for text in boxed]
    assert trl_accuracy_reward(messages, golds) == trls
    # In `$...$` TRL reads them too.
    assert trl_accuracy_reward(messages, [f"${gold}$" for gold in golds]) == ours


class TestAtSight:
    """What is decided without math-verify is what it decides."""

    NUMBERS = [
        "-12",
        "-1",
        "-0.5",
        "0",
        "0.0",
        "+0",
        "1",
        "01",
        "1.0",
        "1.000001",
        "1.00001",
        "1.1",
        ".5",
        "0.50",
        "12.",
    ]

    def test_numbers(self):
        from math_verify import parse, verify

        pairs = [(answer, gold) for answer in self.NUMBERS for gold in self.NUMBERS]
        found = are_equivalent(*zip(*pairs, strict=True))
        for (answer, gold), verdict in zip(pairs, found, strict=True):
            expected = verify(parse(f"${gold}$"), parse(f"${answer}$"))
            assert (verdict is EQUAL) == expected, (answer, gold)

    def test_integers_are_fast(self):
        completions = [rf"\boxed{{{i % 20}}}" for i in range(10_000)]
        started = time.process_time()
        accuracy_reward(completions=completions, answer=["7"] * 10_000)
        assert time.process_time() - started < 1.0


class TestNotation:
    @pytest.mark.parametrize(
        ("value", "latex"),
        [
            (r"$\boxed{ 6 \sqrt { 3 } }$.", r"6 \sqrt { 3 }"),
            (r"a\\[2pt]b", r"a\\ b"),  # a line break of a matrix
            (r"**73**", "73"),
            (r"x²", "x^{2}"),
            (r"10⁻³", "10^{-3}"),
            (r"\color{red}{4}", "{4}"),
            (r"\\frac{1}{2}", r"\frac{1}{2}"),  # escaped twice
            (r"\text{about 5 cm}", r"\text{5 cm}"),
            (r"\$5", r"\$5"),
            (r"1\,", "1"),
            (r"\left\{x\right.", r"\left\{x\right."),
            ("1, 2, ...", "1, 2, ..."),
            ("x = 1.", "x = 1"),
            (r"\sqrt 12", r"\sqrt 12"),  # in LaTeX the root of 1, times 2
            (-3, "-3"),
            (0.1, "0.1"),
        ],
    )
    def test_as_latex(self, value, latex):
        assert as_latex(value) == latex

    @pytest.mark.parametrize("value", [True, ["1"], b"1", 1j])
    def test_no_answer(self, value):
        with pytest.raises(TypeError, match="must be a text, an int or a float, got"):
            accuracy_reward(completions=[r"\boxed{1}"], answer=[value])

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value):
        with pytest.raises(ValueError, match=f"must be finite, got {value}"):
            is_equivalent("1", value)

    def test_spaces(self):
        assert without_spaces(r"6 \sqrt { 3 } + \pi r") == r"6\sqrt{3}+\pi r"
        assert without_spaces("3 1/2") == "3 1/2"


class TestCompletions:
    def score(self, text: str, gold: str) -> float:
        return accuracy_reward(completions=[text], answer=[gold])[0]

    def test_only_a_box_is_an_answer(self):
        assert self.score("12", "12") == self.score("the answer is $12$", "12") == self.score("", "12") == 0.0

    def test_the_last_box_counts(self):
        assert self.score(r"\boxed{1} no, \boxed{2}", "2") == 1.0
        assert self.score(r"\boxed{1} no, \boxed{2}", "1") == 0.0

    def test_a_last_box_that_is_cut_off_is_no_answer(self):
        assert self.score(r"\boxed{1} no, \boxed{1", "1") == 0.0

    def test_plain_and_conversational_completions_score_alike(self):
        texts = [r"\boxed{7}", r"\boxed{8}", "7"]
        plain = accuracy_reward(completions=texts, answer=["7"] * 3, prompts=["ignored"] * 3)
        as_string = [[{"role": "assistant", "content": text}] for text in texts]
        as_blocks = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts]
        assert plain == [1.0, 0.0, 0.0]
        assert accuracy_reward(completions=as_string, answer=["7"] * 3) == plain
        assert accuracy_reward(completions=as_blocks, answer=["7"] * 3) == plain

    def test_rows_without_an_answer_have_no_reward(self):
        assert accuracy_reward(completions=[r"\boxed{7}", "7"], answer=[None, 7]) == [None, 0.0]

    def test_lengths_must_match(self):
        with pytest.raises(ValueError, match="2 completions .* 1 values of `answer`"):
            accuracy_reward(completions=["a", "b"], answer=["1"])

    @pytest.mark.parametrize(
        ("text", "content"),
        [
            (r"a \boxed{b} c", "b"),
            (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
            (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
            (r"\boxed{\}}", r"\}"),
            (r"\boxed{a\\}", r"a\\"),
            (r"\boxed{a \boxed{b}}", r"a \boxed{b}"),
            (r"\boxed{a} \boxed{ }", "a"),
            (r"\boxed{}", ""),
            (r"\boxed {4}", "4"),
            (r"so $\boxed 4$.", "4"),
            (r"\boxed 42.", "42"),
            (r"\boxed\frac{1}{2}", r"\frac{1}{2}"),
            (r"\boxed 4 and \boxed{5}", "5"),
            (r"\boxed{4}, in a \boxed form as \boxed.", "4"),
            (r"\boxed{a} and \boxed{b \boxed{c}", "c"),
            (r"\boxed{a} and \boxed{b \boxed{c", None),
            (r"\boxed{", None),
            ("boxed{1}", None),
            ("", None),
        ],
    )
    def test_last_boxed(self, text, content):
        assert last_boxed(text) == content

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            (r"no thinking, \boxed{4}", r"no thinking, \boxed{4}"),
            ("<think>a</think>b", "b"),
            ("opened by the prompt</think>b", "b"),
            ("<think>a</think>b<think>c</think>d", "d"),
            ("<think>cut off", ""),
            ("<think>a</think>b<think>cut off", ""),
            ("<thinking>a</thinking>b", "b"),
            ("<THINK>a</Think >b", "b"),
            ("<thinking>cut off", ""),
            ("I think > you", "I think > you"),
            ("", ""),
        ],
    )
    def test_answer_part(self, text, part):
        assert answer_part(text) == part

    def test_a_box_in_the_thinking_is_no_answer(self):
        assert self.score(r"<think>\boxed{4}</think> The answer is 5.", "4") == 0.0
        assert self.score(r"<think>\boxed{4}", "4") == 0.0
        assert self.score(r"<think>\boxed{5}</think> \boxed{4}", "4") == 1.0

    @pytest.mark.parametrize(
        "joint", [" or ", " and ", ", ", "/", " & ", "$ or $", ", not ", " not ", ", and ", r" \lor "]
    )
    def test_two_joined_boxes_are_no_answer(self, joint):
        for answers in (("4", "5"), ("5", "4"), (r"\frac{1}{2}", "4")):
            text = rf"So $\boxed{{{answers[0]}}}{joint}\boxed{{{answers[1]}}}$."
            assert self.score(text, answers[0]) == self.score(text, answers[1]) == 0.0
        assert self.score(rf"\boxed{{4}}{joint}\boxed{{4}}", "4") == 1.0
        assert self.score(r"\boxed{5}. Then \boxed{4}", "4") == 1.0

    def test_last_boxed_is_linear(self):
        deep = r"\boxed{" + "{" * 200_000 + "}" * 200_000 + "}"
        started = time.process_time()
        assert len(last_boxed(deep)) == 400_000
        for hostile in (r"\boxed{", r"\boxed{}", r"\boxed", r"\boxed 1", "{", "\\"):
            last_boxed(r"\boxed{" + hostile * 50_000)
            last_boxed(hostile * 50_000)
        assert time.process_time() - started < 2.0

    def test_text_of_a_conversation_is_its_last_message(self):
        conversation = [
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "four"},
        ]
        assert completion_text(conversation) == "four"
        assert completion_text(conversation[:1]) == ""
        assert completion_text([]) == ""


class TestTrainers:
    def test_shares_are_logged(self):
        logged = {}
        accuracy_reward(
            completions=[r"\boxed{\frac{}", r"\boxed{\frac}", r"\boxed{1}", "no box"],
            answer=["2"] * 4,
            log_metric=logged.__setitem__,
        )
        assert logged == {"rewards/accuracy_reward/unparsed": 0.25, "rewards/accuracy_reward/timed_out": 0.0}

    def test_names_are_reward_functions_that_travel(self):
        for name in sapo_trl.rewards.__all__:
            function = getattr(sapo_trl.rewards, name)
            assert function.__name__ == name
            copy = pickle.loads(pickle.dumps(function))
            gold = "A" if name == "multiple_choice_reward" else "1"
            assert copy(completions=["no box"], answer=[gold]) == [0.0]

    @pytest.mark.slow
    def test_importing_rewards_starts_no_process_and_loads_no_math_verify(self):
        code = (
            "import sys, sapo_trl.rewards.equivalence as e; print(e._pool.processes(), 'math_verify' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[] False\n"

    @pytest.mark.parametrize("family", ["qwen2"], indirect=True)
    def test_trls_own_trainer(self, family, tmp_path):
        """What the tiny model writes has no box, so one function is given completions that have one."""
        dataset = text_dataset(4)
        args = GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=4,
            max_steps=1,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            reward_weights=[1.0] * len(REWARDS),
        )
        calls = []

        def boxed_accuracy(completions, **kwargs):
            calls.append(kwargs)
            texts = [rf"\boxed{{{k}}}" for k in range(len(completions))]
            return accuracy_reward(completions=texts, **kwargs)

        trainer = GRPOTrainer(
            model=family.build_model(),
            reward_funcs=[boxed_accuracy, *REWARDS[1:]],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": dataset["prompt"], "answer": ["0", "1", "2", "3"]}),
            processing_class=family.processing_class,
        )
        trainer.train()
        right = [answer == str(k) for k, answer in enumerate(calls[0]["answer"])]
        assert logged(trainer, "rewards/boxed_accuracy/mean") == [sum(right) / 4]
        assert logged(trainer, "rewards/accuracy_reward/unparsed") == [0.0]
        for function in REWARDS[1:]:
            assert logged(trainer, f"rewards/{function.__name__}/mean") == [0.0]
        assert logged(trainer, "rewards/geo3k_reward/timed_out") == [0.0]


# Of answers that are numbers, not letters.
REWARDS = [getattr(sapo_trl.rewards, name) for name in sapo_trl.rewards.__all__ if name != "multiple_choice_reward"]
