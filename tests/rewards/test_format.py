"""Rewards for form and length, and the official recipe's mixture."""

import pickle
import re
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.rewards import get_soft_overlong_punishment

from sapo_trl.rewards import format_reward, geo3k_reward, role_format_reward, step_format_reward
from sapo_trl.rewards.calls import checked_reward
from sapo_trl.rewards.geo3k import Geo3KReward
from sapo_trl.role_aware import role_spans
from sapo_trl.segmentation import StepSegmenter


def score(reward, text: str) -> float:
    (plain,) = reward(completions=[text])
    assert reward(completions=[[{"role": "assistant", "content": text}]], answer=["2"]) == [plain]
    return plain


class TestThink:
    @pytest.mark.parametrize(
        ("text", "expected"),
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
    def test_cases(self, text, expected):
        assert score(format_reward, text) == expected

    @given(st.lists(st.sampled_from(["<think>", "</think>", "\\boxed{", "}", "\n", " ", "x"]), max_size=12))
    def test_equals_the_official_regular_expression(self, parts):
        text = "".join(parts)
        official = re.fullmatch(r"<think>.*</think>.*\\boxed\{.*\}.*", text.strip(), re.DOTALL)
        assert format_reward(completions=[text]) == [float(official is not None)]

    def test_is_linear(self):
        # The regular expression needs the cube of this length.
        hostile = "<think>" + "</think>" * 20_000 + "\\boxed{" * 20_000
        started = time.process_time()
        assert format_reward(completions=[hostile]) == [0.0]
        assert time.process_time() - started < 1.0


class TestSteps:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("Step 1: 1 + 1 = 2.\nStep 2: so \\boxed{2}", 1.0),
            ("Step 1. \\boxed{2}", 1.0),
            ("First.\nStep 1: a\nStep 2: b\n\nAnswer: \\boxed{2}", 1.0),
            ("**Step 1:** a **Step 2:** \\boxed{2}", 1.0),
            ("\\boxed{2}", 0.0),
            ("Step 1: 2", 0.0),
            ("Step 1: \\boxed{2}\nStep 2: done", 0.0),
            ("Step 2: \\boxed{2}", 0.0),
            ("Step 1: a\nStep 3: \\boxed{2}", 0.0),
            ("Step 1: a\nStep 1: \\boxed{2}", 0.0),
            ("Step 01: \\boxed{2}", 0.0),
            ("Step 1: \\boxed{2", 0.0),
        ],
    )
    def test_cases(self, text, expected):
        assert score(step_format_reward, text) == expected

    @given(st.lists(st.sampled_from(["Step 1:", "Step 2:", "Step  3.", "Step 2", "step 1:", " ", "x"]), max_size=8))
    def test_steps_are_what_the_segmenter_announces(self, parts):
        text = "".join(parts)
        announced = [int(re.search(r"\d+", match)[0]) for match in re.findall(StepSegmenter.pattern, text)]
        expected = bool(announced) and announced == list(range(1, len(announced) + 1))
        assert step_format_reward(completions=[text + " \\boxed{2}"]) == [float(expected)]


class TestRoles:
    GOOD = "<perception>AB = 2</perception>\n<think>2 + 2</think>\n\\boxed{4}"

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (GOOD, 1.0),
            (" " + GOOD + ".\n", 1.0),
            (GOOD.replace("AB = 2", " "), 0.0),
            (GOOD.replace("2 + 2", ""), 0.0),
            (GOOD.replace("\\boxed{4}", "4"), 0.0),
            (GOOD.replace("</perception>", ""), 0.0),
            (GOOD + "<think>more</think>", 0.0),
            ("I see: " + GOOD, 0.0),
            (GOOD.replace("\n<think>", " then <think>"), 0.0),
            ("<think>2 + 2</think><perception>AB = 2</perception>\\boxed{4}", 0.0),
            ("<perception>AB<think>2 + 2</think></perception>\\boxed{4}", 0.0),
            ("<think>2 + 2</think> \\boxed{4}", 0.0),
        ],
    )
    def test_cases(self, text, expected):
        assert score(role_format_reward, text) == expected

    def test_rewarded_responses_have_both_roles(self, tokenizer):
        ids = torch.tensor([tokenizer(self.GOOD)["input_ids"]])
        perception, reasoning = role_spans(ids, torch.ones_like(ids).bool(), tokenizer)
        assert score(role_format_reward, self.GOOD) == 1.0
        assert perception.sum() > 0 and reasoning.sum() > 0


class TestGeo3K:
    RIGHT, UNFORMED = r"<think>1 + 1</think> \boxed{2}", r"\boxed{2}"
    WRONG, NOTHING = r"<think>1 + 1</think> \boxed{3}", "2"

    def test_mixture(self):
        completions = [self.RIGHT, self.UNFORMED, self.WRONG, self.NOTHING, self.RIGHT]
        rewards = geo3k_reward(completions=completions, answer=["2"] * 4 + [None])
        assert rewards == [pytest.approx(1.0), 0.9, 0.1, 0.0, None]

    def test_length_penalty(self):
        # int(0.9 * 2048) = 1843; from 2047 on the sum passes the cap.
        lengths = {0: 0.0, 1843: 0.0, 1844: 0.001, 1943: 0.1, 2046: 0.203, 2047: 0.5, 2048: 0.5, 9999: 0.5}
        reward = Geo3KReward(penalized_length=2048)
        rewards = reward(
            completions=[self.RIGHT] * len(lengths),
            answer=["2"] * len(lengths),
            completion_ids=[[0] * length for length in lengths],
        )
        assert rewards == [pytest.approx(1.0 - penalty) for penalty in lengths.values()]
        # With a short limit the cap is out of reach below it, and 0.3 alone comes from one token below it on.
        short = Geo3KReward(penalized_length=100)
        assert short(completions=["2"], answer=["2"], completion_ids=[[0] * 98]) == [pytest.approx(-0.008)]
        assert short(completions=["2"], answer=["2"], completion_ids=[[0] * 99]) == [pytest.approx(-0.309)]

    def test_is_off_by_default(self):
        assert geo3k_reward(completions=[self.RIGHT], answer=["2"], completion_ids=[[0] * 9999]) == [1.0]

    def test_what_it_needs(self):
        with pytest.raises(ValueError, match="`completion_ids` is needed for the length penalty"):
            Geo3KReward(penalized_length=2048)(completions=["2"], answer=["2"])
        with pytest.raises(ValueError, match="`penalized_length` must be at least 1 token, got 0"):
            Geo3KReward(penalized_length=0)

    def test_in_the_log(self):
        logged = {}
        reward = checked_reward(Geo3KReward(penalized_length=2048))
        assert reward.__name__ == "geo3k_reward"
        assert reward(
            completions=[r"\boxed{\frac}"], answer=["2"], completion_ids=[[0]], log_metric=logged.__setitem__
        ) == [0.0]
        assert logged == {"rewards/geo3k_reward/unparsed": 1.0, "rewards/geo3k_reward/timed_out": 0.0}


def test_trls_overlong_punishment_is_dapos():
    """Equation 13 of DAPO, with its own lengths: 16,384 tokens free, 4,096 more at a rising price."""
    reward = pickle.loads(
        pickle.dumps(get_soft_overlong_punishment(max_completion_len=20_480, soft_punish_cache=4_096))
    )
    lengths = {1: 0.0, 16_384: 0.0, 16_385: -1 / 4096, 18_432: -0.5, 20_480: -1.0, 20_481: -1.0}
    assert reward(completion_ids=[[0] * length for length in lengths]) == list(lengths.values())
    assert checked_reward(reward).__name__ == "soft_overlong_punishment_reward"
