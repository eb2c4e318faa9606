"""Rewards with places in the text: they are placed there, and their sum is the reward."""

import asyncio

import pandas as pd
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_chat_template

from sapo_trl.embedded import build_tokenizer
from sapo_trl.recordings import segmented_responses
from sapo_trl.rewards.completion import completion_text
from sapo_trl.rewards.steps import StepReward
from tests.testing_utils import (
    FAMILIES,
    QUIET_ON_CPU,
    Recorder,
    fixed_rollout,
    logged,
    never_logged,
    sapo_trainer,
    script_generation,
)


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
# Returns and advantages are plain sums.
PLAIN = {
    "critic": "none",
    "lam": 1.0,
    "beta": 0.0,
    "whiten_advantages": False,
    "advantage_clamp": None,
    "segmentation": "token",
    "max_steps": 1,
    "num_mini_batches": 1,
    "per_device_train_batch_size": 4,
}
LENGTHS = (8, 3, 6, 1)


def letters(prompts, trainer) -> list[list[int]]:
    """Completions whose tokens are a letter each."""
    words = ["abcdefgh"[: LENGTHS[row % 4]] for row in range(len(prompts))]
    return [[trainer.processing_class.convert_tokens_to_ids(letter) for letter in word] for word in words]


def third_letter(text: str) -> tuple[int, int]:
    return min(2, len(text) - 1), min(3, len(text))


def score(text: str) -> float:
    return len(text) / 4 - 1


def at_the_step(completions, **kwargs):
    texts = map(completion_text, completions)
    return [StepReward([(*third_letter(text), score(text))] if text else []) for text in texts]


def at_the_end(completions, **kwargs):
    return [float(reward) for reward in at_the_step(completions)]


def rollout_of(family, tmp_path, reward_funcs, name="run", trainer_kwargs=None, **settings):
    recorder = Recorder()
    kwargs = {"rollout_func": fixed_rollout(letters), **(trainer_kwargs or {})}
    kwargs = {"reward_funcs": reward_funcs, "callbacks": [recorder], **kwargs}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    trainer = sapo_trainer(family, tmp_path / name, trainer_kwargs=kwargs, **{**PLAIN, **settings})
    trainer.train()
    return trainer, recorder.rollouts[0]


@TEXT_FAMILY
@pytest.mark.parametrize("segmentation", ["token", "entropy", "sequence"])
def test_the_same_reward_at_the_end_or_at_its_step_gives_the_same_return_at_the_start(family, segmentation, tmp_path):
    _, end = rollout_of(family, tmp_path, at_the_end, "end", segmentation=segmentation)
    _, step = rollout_of(family, tmp_path, at_the_step, "step", segmentation=segmentation)
    assert torch.equal(step.segments.ids, end.segments.ids) and torch.equal(step.rewards, end.rewards)
    torch.testing.assert_close(step.returns[:, 0], end.returns[:, 0])
    torch.testing.assert_close(step.returns[:, 0], end.rewards)
    assert end.rewards.tolist() == [1.0, -0.25, 0.5, -0.75]
    if segmentation != "token":
        return
    for row, length in enumerate(LENGTHS):
        reward, place = end.rewards[row].item(), min(2, length - 1)
        assert step.token_rewards[row].tolist() == [reward if token == place else 0.0 for token in range(8)]
        # Behind the step there is nothing left to gain or to lose.
        assert step.returns[row].tolist() == [reward if token <= place else 0.0 for token in range(8)]
        assert end.returns[row].tolist() == [reward if token < length else 0.0 for token in range(8)]


@TEXT_FAMILY
def test_several_functions_with_weights_and_completions_without_a_reward(family, tmp_path):
    def steps(completions, **kwargs):
        texts = list(map(completion_text, completions))
        rewards = [StepReward([(0, 1, 1.0), (1, 2, -0.5), (1, 2, 0.25)], final=2.0), 4.0, None, None]
        assert [len(text) for text in texts] == list(LENGTHS)
        return rewards

    async def others(completions, **kwargs):
        await asyncio.sleep(0)
        return [1.0, StepReward([(2, 3, 3.0)]), 0.5, None]

    trainer, rollout = rollout_of(
        family, tmp_path, [steps, others], reward_weights=[0.5, 2.0], segmentation="sequence", log_completions=True
    )
    expected = torch.zeros(4, 8)
    expected[0, 0], expected[0, 1], expected[0, 7] = 0.5 * 1.0, 0.5 * -0.25, 0.5 * 2.0 + 2.0 * 1.0
    expected[1, 2] = 0.5 * 4.0 + 2.0 * 3.0
    expected[2, 5] = 2.0 * 0.5
    assert torch.equal(rollout.token_rewards, expected)
    assert rollout.rewards[:3].tolist() == pytest.approx(expected.sum(1)[:3].tolist())
    assert rollout.rewards[3].isnan() and not rollout.segments.mask[3].any()
    # One segment: its reward is the sum.
    assert rollout.returns[:3, 0].tolist() == pytest.approx(expected.sum(1)[:3].tolist())
    assert logged(trainer, "rewards/steps/mean") == [pytest.approx((2.75 + 4.0) / 2)]
    assert logged(trainer, "rewards/steps/steps") == [3 / 4]
    assert logged(trainer, "rewards/steps/placed") == [pytest.approx(0.75 / 4)]
    assert logged(trainer, "rewards/others/placed") == [pytest.approx(3.0 / 4)]
    table = pd.read_parquet(tmp_path / "run" / "completions" / "completions_00001.parquet")
    assert [list(row) for row in table["segments/rewards"]] == [[3.375], [8.0], [1.0], []]
    records = segmented_responses(rollout, 0)
    assert records[0]["token_rewards"] == expected[0].tolist() and records[1]["token_rewards"] == [0.0, 0.0, 8.0]


@TEXT_FAMILY
def test_a_function_without_steps_logs_none(family, tmp_path):
    trainer, _ = rollout_of(family, tmp_path, at_the_end)
    assert never_logged(trainer, "rewards/at_the_end/steps")


@TEXT_FAMILY
def test_the_kl_penalty_is_on_top(family, tmp_path):
    settings = {"beta": 0.5, "kl_placement": "reward", "max_steps": 2, "num_mini_batches": 1}
    rollouts = {}
    for function in (at_the_end, at_the_step):
        trainer, _ = rollout_of(family, tmp_path, function, function.__name__, **settings)
        rollouts[function] = trainer.callback_handler.callbacks
    recorders = [next(c for c in callbacks if isinstance(c, Recorder)) for callbacks in rollouts.values()]
    # In the first rollout the policy is the reference.
    end, step = (recorder.rollouts[0] for recorder in recorders)
    torch.testing.assert_close(step.token_rewards.sum(1), end.token_rewards.sum(1))
    late = recorders[1].rollouts[1]
    outside = torch.ones_like(late.segments.mask)
    outside[torch.arange(4), torch.tensor([2, 2, 2, 0])] = False
    assert late.token_rewards[outside & late.segments.mask].abs().max() > 0


@TEXT_FAMILY
@pytest.mark.parametrize("estimator", ["group", "leave_one_out", "batch"])
def test_estimators_over_rewards_use_the_sum_alone(family, estimator, tmp_path):
    settings = {"advantage_estimator": estimator, "num_generations": 1 if estimator == "batch" else 2}
    _, end = rollout_of(family, tmp_path, at_the_end, "end", **settings)
    _, step = rollout_of(family, tmp_path, at_the_step, "step", **settings)
    assert end.advantages.abs().max() > 0.1
    torch.testing.assert_close(step.advantages, end.advantages)
    assert not torch.equal(step.token_rewards, end.token_rewards)


@TEXT_FAMILY
def test_equal_sums_in_different_places_are_no_equal_rewards(family, tmp_path):
    def balanced(completions, **kwargs):
        return [StepReward([(0, 1, 0.5)], final=0.5) for _ in completions]

    settings = {"whiten_advantages": True, "critic": "separate"}
    trainer, rollout = rollout_of(family, tmp_path, balanced, **settings)
    assert rollout.rewards.tolist() == [1.0] * 4
    assert logged(trainer, "advantages/zeroed") == [0.0] and rollout.advantages.abs().max() > 0.1
    trainer, rollout = rollout_of(family, tmp_path, lambda completions, **kwargs: [1.0] * 4, "other", **settings)
    assert logged(trainer, "advantages/zeroed") == [1.0] and rollout.advantages.abs().max() == 0


SAMPLED = {
    "monte_carlo": {"critic": "monte_carlo", "num_continuations": 2, "lam": 0.9},
    "capped": {"critic": "monte_carlo", "num_continuations": 2, "lam": 0.9, "max_valued_segments": 2},
    "tree": {
        "critic": "tree",
        "segmentation": "sequence",
        "num_generations": 4,
        "tree_widths": [2, 2],
        "tree_segment_length": 3,
    },
}


def of_letters(completions, **kwargs):
    """A reward for each of the first four letters, known as soon as the letter is there."""
    texts = map(completion_text, completions)
    return [StepReward([(i, i + 1, ord(text[i]) % 5 / 4) for i in range(min(4, len(text)))]) for text in texts]


def of_letters_at_the_end(completions, **kwargs):
    return [float(reward) for reward in of_letters(completions)]


@TEXT_FAMILY
@pytest.mark.parametrize("settings", SAMPLED.values(), ids=SAMPLED)
def test_sampled_values_count_the_rewards_to_come(family, settings, tmp_path):
    """With such values it makes no difference where a reward is placed, as long as it is known by then."""
    texts = [family.tokenizer.decode([token]) for token in range(len(family.tokenizer))]
    is_whole = [text.isascii() and token not in family.tokenizer.all_special_ids for token, text in enumerate(texts)]
    suppressed = [
        token for token, whole in enumerate(is_whole) if not whole and token != family.tokenizer.eos_token_id
    ]
    rollouts = []
    for function in (of_letters_at_the_end, of_letters):
        _, rollout = rollout_of(
            family,
            tmp_path,
            function,
            function.__name__,
            trainer_kwargs={"rollout_func": None},
            generation_kwargs={"suppress_tokens": suppressed},
            **settings,
        )
        rollouts.append(rollout)
    end, step = rollouts
    assert torch.equal(step.completion_ids, end.completion_ids) and end.advantages.abs().max() > 0.1
    torch.testing.assert_close(step.advantages, end.advantages, atol=1e-6, rtol=0)
    if settings["critic"] == "monte_carlo":
        assert (step.values - end.values).abs().max() > 0.1


@TEXT_FAMILY
def test_continuations_are_scored_from_their_prefixes_on(family, tmp_path):
    trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"reward_funcs": at_the_step})
    rows = [trainer.train_dataset[0]] * 3
    sampler = trainer.continuation_sampler(trainer.tokenized_prompts(rows), rows)
    ids = [family.tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefgh"]
    assert sampler.scores([0, 1, 2], [ids] * 3, [0, 2, 3]).tolist() == [[1.0], [1.0], [0.0]]


@TEXT_FAMILY
def test_evaluation_and_plain_text(family, tmp_path):
    data = Dataset.from_dict({"prompt": ["Find AB.", "Find BC."] * 4})
    trainer, rollout = rollout_of(
        family,
        tmp_path,
        at_the_step,
        trainer_kwargs={"train_dataset": data, "eval_dataset": data.select(range(2)), "rollout_func": None},
        per_device_eval_batch_size=2,
        num_generations_eval=1,
    )
    assert rollout.token_rewards[:, -1].eq(0).all()
    torch.testing.assert_close(rollout.token_rewards.sum(1), rollout.rewards)
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/at_the_step/placed"] == pytest.approx(metrics["eval_reward"], abs=1e-6)


@TEXT_FAMILY
def test_a_span_outside_the_text_is_an_error(family, tmp_path):
    def careless(completions, **kwargs):
        return [StepReward([(1, 4, 1.0)])] * len(completions)

    with pytest.raises(
        ValueError, match=r"`careless`, completion 1 of 4: the span \(1, 4, 1.0, -1\) must .*end <= 3;"
    ):
        rollout_of(family, tmp_path, careless)


@TEXT_FAMILY
def test_a_completion_that_cannot_be_scored_costs_the_others_nothing(family, tmp_path):
    def moody(completions, **kwargs):
        if any(len(completion_text(completion)) == 3 for completion in completions):
            raise ZeroDivisionError
        return at_the_step(completions)

    _, rollout = rollout_of(family, tmp_path, moody)
    assert rollout.rewards[1].isnan() and rollout.token_rewards[1].eq(0).all()
    assert rollout.token_rewards[0].tolist() == [0.0, 0.0, 1.0, *[0.0] * 5]


@TEXT_FAMILY
def test_trls_own_trainer_takes_the_same_function(family, tmp_path):
    args = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=8, max_steps=1,
        learning_rate=0.1, **QUIET_ON_CPU,
    )  # fmt: skip
    seen = []

    def remembered(completions, **kwargs):
        seen.extend(at_the_end(completions))
        return at_the_step(completions)

    trainer = GRPOTrainer(
        family.build_model(), remembered, args, family.dataset(), processing_class=family.processing_class
    )
    trainer.train()
    assert logged(trainer, "rewards/remembered/mean") == [pytest.approx(sum(seen) / 4, abs=1e-6)]


ANSWER = "Done.<|im_end|>"


class Steps:
    """An environment that rewards each call when it is made."""

    def reset(self, **kwargs):
        self.calls = []

    def add(self, a: int) -> int:
        """
        Add a number.

        Args:
            a: The number.
        """
        self.calls.append(a)
        return sum(self.calls)

    def get_reward(self) -> float:
        # The answer of call number i is message 2i + 1.
        return StepReward([(0, None, float(a), 2 * i + 1) for i, a in enumerate(self.calls)], final=0.5)


def test_turns_of_an_environment(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    recorder = Recorder()
    trainer = sapo_trainer(
        FAMILIES["qwen2"](tokenizer),
        tmp_path,
        **{**PLAIN, "max_completion_length": 300},
        trainer_kwargs={"environment_factory": Steps, "reward_funcs": None, "callbacks": [recorder]},
    )

    def call(a):
        return f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}}}}}\n</tool_call><|im_end|>'

    turns = script_generation(trainer, [[call(3), call(5), ANSWER, call(8)], [call(4), ANSWER, ANSWER], [ANSWER]])
    trainer.train()
    (rollout,) = recorder.rollouts
    assert rollout.rewards.tolist() == [7.5, 5.5, 0.5, 8.5]
    turns_of = [[(0, 0), (1, 0), (2, 0)], [(0, 1), (1, 1)], [(0, 2)], [(0, 3), (1, 2)]]
    amounts = [[3.0, 4.0, 0.5], [5.0, 0.5], [0.5], [8.0, 0.5]]
    for row, (said, expected) in enumerate(zip(turns_of, amounts, strict=True)):
        lengths = torch.tensor([len(turns[turn][index]) for turn, index in said])
        ends = lengths.cumsum(0) - 1
        own_tokens = rollout.token_rewards[row][rollout.segments.mask[row]]
        assert own_tokens.nonzero().flatten().tolist() == ends.tolist()
        assert own_tokens[ends].tolist() == expected
        assert rollout.token_rewards[row].sum() == sum(expected)
