import threading
import time

import pytest

from sapo_trl.rewards import accuracy_reward, format_reward
from sapo_trl.rewards.completion import completion_text, last_boxed


def score(text: str, gold: str) -> float:
    return accuracy_reward(completions=[text], answer=[gold])[0]


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        # geometry3k writes its answers like this; without `$` math-verify reads 3 off it.
        (r"\boxed{6\sqrt{3}}", r"6 \sqrt { 3 }", 1.0),
        (r"\boxed{3}", r"6 \sqrt { 3 }", 0.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{60^\circ}", "60", 1.0),
        (r"\boxed{x=60}", "60", 1.0),
        (r"\boxed{5\text{ cm}}", "5", 1.0),
        (r"\boxed{2\sqrt{221}}", r"\sqrt{884}", 1.0),
        (r"\boxed{1,000}", "1000", 1.0),
        (r"\boxed{12}", "12", 1.0),
        (r"\boxed{ 12 }", "12", 1.0),
        (r"\boxed{012}", "12", 1.0),
        (r"\boxed{+12}", "12", 1.0),
        (r"\boxed{-12}", "12", 0.0),
        (r"\boxed{13}", "12", 0.0),
        (r"\boxed{112}", "12", 0.0),
        (r"\boxed{}", "12", 0.0),
        (r"\boxed{}", "", 0.0),
        ("12", "12", 0.0),
        ("the answer is $12$", "12", 0.0),
        ("", "12", 0.0),
    ],
)
def test_accuracy_of_one_completion(text, gold, reward):
    assert score(text, gold) == reward


def test_the_last_box_counts():
    assert score(r"\boxed{1} no, \boxed{2}", "2") == 1.0
    assert score(r"\boxed{1} no, \boxed{2}", "1") == 0.0


def test_a_last_box_that_is_cut_off_is_no_answer():
    assert score(r"\boxed{1} no, \boxed{1", "1") == 0.0


def test_integers_agree_with_math_verify():
    from math_verify import parse, verify

    for answer in range(-12, 13):
        for gold in range(-12, 13):
            expected = verify(parse(f"${gold}$"), parse(f"${answer}$"))
            assert score(f"\\boxed{{{answer}}}", str(gold)) == float(expected), (answer, gold)


def test_plain_and_conversational_completions_score_alike():
    texts = [r"\boxed{7}", r"\boxed{8}", "7"]
    plain = accuracy_reward(completions=texts, answer=["7"] * 3, prompts=["ignored"] * 3)
    as_string = [[{"role": "assistant", "content": text}] for text in texts]
    as_blocks = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts]
    assert plain == [1.0, 0.0, 0.0]
    assert accuracy_reward(completions=as_string, answer=["7"] * 3) == plain
    assert accuracy_reward(completions=as_blocks, answer=["7"] * 3) == plain


def test_answers_may_be_numbers():
    assert accuracy_reward(completions=[r"\boxed{7}"], answer=[7]) == [1.0]


def test_lengths_must_match():
    with pytest.raises(ValueError, match="2 completions .* 1 values of `answer`"):
        accuracy_reward(completions=["a", "b"], answer=["1"])


def test_off_the_main_thread():
    # math-verify limits its time by a signal, which no other thread can receive.
    rewards = []
    completions = [r"\boxed{6\sqrt{3}}", r"\boxed{3}", r"\boxed{\frac{12}{2}\sqrt{3}}"]

    def compute():
        rewards.append(accuracy_reward(completions=completions, answer=[r"6 \sqrt { 3 }"] * 3))

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == [[1.0, 0.0, 1.0]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("off_main_thread", [False, True])
def test_an_answer_that_cannot_be_computed_does_not_hang(off_main_thread):
    rewards = []

    def compute():
        rewards.append(score(r"\boxed{9^{9^{9^9}}}", r"\sqrt{2}"))

    started = time.perf_counter()
    if off_main_thread:
        thread = threading.Thread(target=compute, daemon=True)
        thread.start()
        thread.join(timeout=120)
    else:
        compute()
    assert rewards == [0.0]
    assert time.perf_counter() - started < 120


def test_integers_are_fast():
    completions = [rf"\boxed{{{i % 20}}}" for i in range(10_000)]
    started = time.perf_counter()
    accuracy_reward(completions=completions, answer=["7"] * 10_000)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"a \boxed{b} c", "b"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{", None),
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_text_of_a_conversation_is_its_last_message():
    conversation = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "four"},
    ]
    assert completion_text(conversation) == "four"
    assert completion_text(conversation[:1]) == ""
    assert completion_text([]) == ""


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>1 + 1</think> \\boxed{2}", 1.0),
        ("<think>\n1 + 1\n</think>\n\nSo \\boxed{2}.\n", 1.0),
        ("\\boxed{2}", 0.0),
        ("<think>1 + 1 \\boxed{2}", 0.0),
        ("<think>1 + 1</think> 2", 0.0),
        ("<think>\\boxed{2}</think>", 0.0),
        ("So <think>1 + 1</think> \\boxed{2}", 0.0),
    ],
)
def test_format_reward(text, reward):
    assert format_reward(completions=[text]) == [reward]
    assert format_reward(completions=[[{"role": "assistant", "content": text}]], answer=["2"]) == [reward]
