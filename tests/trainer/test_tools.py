"""Tools and environments: tokens that the policy did not write."""

import json
import math

import pytest
from trl.chat_template_utils import qwen3_chat_template

from sapo_trl import SAPOTrainer
from sapo_trl.embedded import build_tokenizer
from tests.testing_utils import (
    FAMILIES,
    Recorder,
    logged,
    sapo_config,
    sapo_trainer,
    script_generation,
    state_of,
    unmoved,
)


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.
    """
    return a * b


class Counter:
    """An environment whose reward is how often it was asked to count, and by how much."""

    def __init__(self):
        self.total = 0

    def reset(self, **kwargs):
        self.total = 0

    def count(self, by: int) -> int:
        """
        Count on.

        Args:
            by: How far.
        """
        self.total += by
        return self.total

    def get_reward(self) -> float:
        return float(self.total)


class Echo:
    """An environment whose reward is the length of what it was told."""

    def reset(self, **kwargs):
        self.told = ""

    def shout(self, text: str) -> str:
        """
        Say it louder.

        Args:
            text: What to say.
        """
        self.told = text
        return text + "!"

    def get_reward(self) -> float:
        return float(len(self.told))


class TestTools:
    ANSWER = "It is done.<|im_end|>"

    @pytest.fixture
    def tool_family(self):
        tokenizer = build_tokenizer()
        tokenizer.chat_template = qwen3_chat_template
        return FAMILIES["qwen2"](tokenizer)

    def check_masks(self, trainer, rollout, said: list[list[int]], heard: list[str | None]):
        """What the policy said is in segments, and what it heard is not."""
        for row, (ids, text) in enumerate(zip(said, heard, strict=True)):
            mask, completion = rollout.segments.mask[row], rollout.completion_ids[row]
            if text is not None:  # no segment is on both sides of what it heard
                turn, segments = int((~mask).nonzero()[0]), rollout.segments.ids[row]
                assert segments[:turn].max() < segments[turn:][mask[turn:]].min()
            assert completion[mask].tolist() == ids
            # Up to the last token that the policy said; what follows is padding.
            last = int(mask.nonzero().max())
            between = trainer.tokenizer.decode(completion[: last + 1][~mask[: last + 1]])
            if text is None:
                assert between == ""
            else:
                assert f"<tool_response>\n{text}\n</tool_response>" in between
            assert rollout.advantages[row][~mask].abs().max() == 0
            assert rollout.token_rewards[row].nonzero().flatten().tolist() in ([], [last])

    @pytest.mark.parametrize("critic", ["separate", "shared", "ladder"])
    def test_tool_tokens_are_masked(self, tool_family, critic, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            tool_family,
            tmp_path,
            critic=critic,
            max_completion_length=200,
            beta=0.0,
            trainer_kwargs={"tools": [multiply], "callbacks": [recorder]},
        )
        call = '<tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call><|im_end|>'
        first, second = script_generation(
            trainer, [[call, self.ANSWER, call, self.ANSWER], [self.ANSWER, self.ANSWER]]
        )
        policy = state_of(trainer.model)
        trainer.train()
        said = [first[0] + second[0], first[1], first[2] + second[1], first[3]]
        self.check_masks(trainer, recorder.rollouts[0], said, ["42", None, "42", None])
        assert logged(trainer, "tools/call_frequency") == [0.5]
        assert unmoved(policy, trainer.model) == []

    def test_environment(self, tool_family, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            tool_family,
            tmp_path,
            max_completion_length=200,
            beta=0.0,
            trainer_kwargs={"environment_factory": Counter, "reward_funcs": None, "callbacks": [recorder]},
        )

        def call(by):
            return f'<tool_call>\n{{"name": "count", "arguments": {{"by": {by}}}}}\n</tool_call><|im_end|>'

        first, second = script_generation(
            trainer, [[call(3), call(5), self.ANSWER, call(8)], [self.ANSWER, self.ANSWER, self.ANSWER]]
        )
        trainer.train()
        said = [first[0] + second[0], first[1] + second[1], first[2], first[3] + second[2]]
        self.check_masks(trainer, recorder.rollouts[0], said, ["3", "5", None, "8"])
        assert recorder.rollouts[0].rewards.tolist() == [3.0, 5.0, 0.0, 8.0]
        assert logged(trainer, "rewards/Counter/mean") == [4.0]

    def test_environment_may_bring_the_prompts(self, tool_family, tmp_path):
        class Asking(Counter):
            def reset(self, **kwargs):
                super().reset()
                return "Find AB."

        recorder = Recorder()
        trainer = SAPOTrainer(
            model=tool_family.build_model(),
            args=sapo_config(tmp_path),
            processing_class=tool_family.tokenizer,
            environment_factory=Asking,
            callbacks=[recorder],
        )
        trainer.train()
        assert "Find AB." in trainer.tokenizer.decode(recorder.rollouts[0].prompt_ids[0])

    @pytest.fixture
    def routed(self, tool_family):
        rows = tool_family.dataset()
        return rows.add_column("environment", ["counter", "echo"] * (len(rows) // 2))

    def test_several_environments(self, tool_family, routed, tmp_path):
        """Each row has the tools and the reward of the environment that it names."""
        recorder = Recorder()
        trainer = sapo_trainer(
            tool_family,
            tmp_path,
            max_completion_length=200,
            beta=0.0,
            shuffle_dataset=False,
            max_steps=1,
            trainer_kwargs={
                "environment_factory": {"counter": Counter, "echo": Echo},
                "reward_funcs": None,
                "train_dataset": routed,
                "callbacks": [recorder],
            },
        )

        def call(name, argument):
            call = {"name": name, "arguments": argument}
            return f"<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>"

        turns = [call("count", {"by": 3}), call("shout", {"text": "AB"}), self.ANSWER, call("count", {"by": 1})]
        first, second = script_generation(trainer, [turns, [self.ANSWER] * 3])
        trainer.train()
        (rollout,) = recorder.rollouts
        said = [first[0] + second[0], first[1] + second[1], first[2], first[3] + second[2]]
        for row, ids in enumerate(said):
            assert rollout.completion_ids[row][rollout.segments.mask[row]].tolist() == ids
        heard = [trainer.tokenizer.decode(ids) for ids in rollout.completion_ids]
        assert "<tool_response>\n3\n" in heard[0] and "<tool_response>\nAB!\n" in heard[1]
        # The last row is the echo's, which knows no `count`.
        assert "error" in heard[3] and "<tool_response>\n1\n" not in heard[3]
        assert rollout.rewards.tolist() == [3.0, 2.0, 0.0, 0.0]
        prompts = [trainer.tokenizer.decode(ids) for ids in rollout.prompt_ids]
        assert ['"shout"' in prompt for prompt in prompts] == [False, True, False, True]

    def test_an_environment_that_nobody_knows(self, tool_family, routed, tmp_path):
        trainer = sapo_trainer(
            tool_family,
            tmp_path,
            trainer_kwargs={
                "environment_factory": {"counter": Counter, "other": Echo},
                "reward_funcs": None,
                "train_dataset": routed,
            },
        )
        with pytest.raises(ValueError, match="`environment='echo'`, which is not among the environments"):
            trainer.train()

    def test_calls_that_cannot_be_made(self, tool_family, tmp_path):
        """The policy hears why, is trained on what it said, and the failures are counted."""
        recorder = Recorder()
        trainer = sapo_trainer(
            tool_family,
            tmp_path,
            max_completion_length=200,
            beta=0.0,
            max_steps=1,
            trainer_kwargs={"tools": [multiply], "callbacks": [recorder]},
        )
        calls = ['{"name": "multiply", "arguments": {"a": 6}}', '{"name": "divide", "arguments": {"a": 6, "b": 3}}']
        calls = [f"<tool_call>\n{call}\n</tool_call><|im_end|>" for call in calls]
        unread = "<tool_call>\n{not json\n</tool_call><|im_end|>"
        first, second = script_generation(trainer, [[*calls, unread, self.ANSWER], [self.ANSWER] * 2])
        trainer.train()
        (rollout,) = recorder.rollouts
        said = [first[0] + second[0], first[1] + second[1], first[2], first[3]]
        for row, ids in enumerate(said):
            assert rollout.completion_ids[row][rollout.segments.mask[row]].tolist() == ids
        heard = [trainer.tokenizer.decode(ids) for ids in rollout.completion_ids]
        assert "error" in heard[0] and "error" in heard[1]
        assert logged(trainer, "tools/failure_frequency") == [1.0]

    def test_infinite_reward_of_an_environment(self, tool_family, tmp_path):
        class Broken(Counter):
            def get_reward(self):
                return math.inf

        trainer = sapo_trainer(
            tool_family, tmp_path, trainer_kwargs={"environment_factory": Broken, "reward_funcs": None}
        )
        with pytest.raises(ValueError, match="`Broken` returned inf for completion 0 of 4"):
            trainer.train()
