"""The gate on the critic: which advantages a rollout gets, and that one decision holds for all processes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from sapo_trl import SAPOConfig, Segments
from sapo_trl.advantages import mean_baseline_advantages, segment_gae
from sapo_trl.trainer.stages import gated

from ..strategies import noise, partitions, seeds, token_lists
from ..testing_utils import (
    Recorder,
    fixed_rollout,
    logged,
    never_logged,
    random_completions,
    sapo_trainer,
    state_of,
    unmoved,
)


LEARNED = ["separate", "shared", "adapter"]
ALONE = SimpleNamespace(sum=lambda tensor: tensor)


def loop_returns(rewards, segments, gamma) -> list[list[float]]:
    """The discounted rewards from each segment on, one segment at a time."""
    rows = []
    for b, row in enumerate(token_lists(segments)):
        following, returns = 0.0, []
        for tokens in reversed(row):
            following = sum(rewards[b, t].item() for t in tokens) + gamma * following
            returns.insert(0, following)
        rows.append(returns)
    return rows


@given(partitions(), seeds, st.floats(0, 1))
def test_mean_baseline_equals_the_definition(segments, seed, gamma):
    rewards = noise(segments.ids, seed)
    of_rows = loop_returns(rewards, segments, gamma)
    everything = [number for row in of_rows for number in row]
    mean = sum(everything) / max(len(everything), 1)
    expected = [torch.zeros_like(rewards), torch.zeros_like(rewards)]
    for b, row in enumerate(token_lists(segments)):
        for tokens, number in zip(row, of_rows[b], strict=True):
            expected[0][b, tokens] = number - mean
            expected[1][b, tokens] = number
    result = mean_baseline_advantages(rewards, segments, gamma)
    torch.testing.assert_close(result, tuple(expected), rtol=0, atol=1e-10)


@given(partitions(), seeds)
def test_mean_baseline_is_gae_with_the_mean_as_every_value(segments, seed):
    rewards = noise(segments.ids, seed)
    advantages, returns = mean_baseline_advantages(rewards, segments)
    value = returns[segments.is_last].mean() if segments.is_last.any() else torch.tensor(0.0)
    expected, _ = segment_gae(rewards, value.expand_as(rewards), segments, lam=1.0)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-10)


def settings(tmp_path, **overrides):
    return SAPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **overrides)


@pytest.mark.parametrize("value_state", ["start", "end"])
@pytest.mark.parametrize("seed", range(4))
def test_opens_at_the_explained_variance_of_monte_carlo_returns(seed, value_state, tmp_path):
    """Just below it the critic's advantages are kept, bit for bit; just above it the mean is the baseline."""
    segments = Segments(torch.tensor([[0, 0, 1, 2, 2, -1], [0, 1, 1, 1, -1, -1], [-1] * 6, [0, 1, 2, 3, 4, 4]]))
    rewards, advantages = noise(segments.ids, seed).float(), noise(segments.ids, seed + 1).float()
    returns = [number for row in loop_returns(rewards, segments, 0.9) for number in row]
    places = [
        (b, tokens[0 if value_state == "start" else -1])
        for b, row in enumerate(token_lists(segments))
        for tokens in row
    ]
    values = noise(segments.ids, seed + 2).float()
    for (b, t), number in zip(places, returns, strict=True):
        values[b, t] = 0.5 * values[b, t] + number
    residuals = [number - values[b, t].item() for (b, t), number in zip(places, returns, strict=True)]
    explained = 1 - np.var(residuals) / np.var(returns)
    for threshold, is_closed in ((explained - 1e-4, False), (explained + 1e-4, True)):
        args = settings(tmp_path, gamma=0.9, value_state=value_state, critic_min_explained_variance=float(threshold))
        result, metrics = gated(advantages, rewards, values, segments, args, ALONE)
        expected = mean_baseline_advantages(rewards, segments, 0.9)[0] if is_closed else advantages
        assert torch.equal(result, expected)
        assert metrics["critic/gated"][0] == float(is_closed)
        assert metrics["critic/monte_carlo_explained_variance"][0].item() == pytest.approx(explained, abs=1e-5)


def test_equal_returns_close_it(tmp_path):
    """Nothing tells the responses apart, so no token has an advantage, whatever the critic says."""
    segments = Segments(torch.tensor([[0, 1, 2], [0, 0, 1]]))
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    values, advantages = torch.randn(2, 3), torch.randn(2, 3)
    args = settings(tmp_path, critic_min_explained_variance=-1e9)
    result, metrics = gated(advantages, rewards, values, segments, args, ALONE)
    assert torch.equal(result, torch.zeros(2, 3))
    assert metrics["critic/gated"][0] == 1 and metrics["critic/monte_carlo_explained_variance"][0].isnan()


def test_all_processes_decide_alike(tmp_path):
    """The rows of one process are explained, the rows of the other are not: the whole rollout decides."""
    segments = Segments(torch.zeros(4, 1, dtype=torch.long))
    rewards = torch.tensor([[0.0], [1.0], [0.0], [2.0]])  # the processes' means differ
    values = torch.tensor([[0.0], [1.0], [2.2], [0.0]])
    advantages = torch.arange(4.0).unsqueeze(1)
    args = settings(tmp_path, critic_min_explained_variance=0.0)
    halves = (slice(0, 2), slice(2, 4))
    alone = [
        gated(advantages[rows], rewards[rows], values[rows], Segments(segments.ids[rows]), args, ALONE)[1]
        for rows in halves
    ]
    assert [metrics["critic/gated"][0].item() for metrics in alone] == [0, 1]

    whole, metrics = gated(advantages, rewards, values, segments, args, ALONE)
    sums = []  # of the whole rollout, in the order in which a process asks for them
    gated(advantages, rewards, values, segments, args, SimpleNamespace(sum=lambda x: sums.append(x) or x))
    for rows in halves:
        remaining = iter(sums)
        together = SimpleNamespace(sum=lambda x, remaining=remaining: next(remaining))
        part = gated(advantages[rows], rewards[rows], values[rows], Segments(segments.ids[rows]), args, together)
        torch.testing.assert_close(part[0], whole[rows])
        assert part[1] == metrics
    assert metrics["critic/gated"][0] == 1


def run(family, tmp_path, **overrides):
    recorder = Recorder()
    critic = overrides.get("critic", "separate")
    extra = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])} if critic == "adapter" else {}
    trainer = sapo_trainer(
        family,
        tmp_path,
        max_steps=4,
        beta=0.1,
        gamma=0.9,
        whiten_advantages=False,
        advantage_clamp=None,
        trainer_kwargs={
            "callbacks": [recorder],
            "rollout_func": fixed_rollout(random_completions()),
            **extra,
        },
        **overrides,
    )
    before = state_of(trainer.critic.value_head)
    trainer.train()
    return trainer, recorder.rollouts, before


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
@pytest.mark.parametrize("critic", LEARNED)
class TestTraining:
    def test_closed(self, family, critic, tmp_path):
        """Advantages are returns minus their mean, by plain loops; the critic learns as before."""
        trainer, rollouts, before = run(family, tmp_path, critic=critic, critic_min_explained_variance=0.999)
        assert len(rollouts) == 2
        for rollout in rollouts:
            of_rows = loop_returns(rollout.token_rewards, rollout.segments, 0.9)
            mean = np.mean([number for row in of_rows for number in row])
            for b, row in enumerate(token_lists(rollout.segments)):
                for tokens, number in zip(row, of_rows[b], strict=True):
                    for t in tokens:
                        assert rollout.advantages[b, t].item() == pytest.approx(number - mean, abs=1e-5)
        assert logged(trainer, "critic/gated") == [1.0, 1.0]
        trainable = {
            name for name, parameter in trainer.critic.value_head.named_parameters() if parameter.requires_grad
        }
        assert trainable and not trainable & set(unmoved(before, trainer.critic.value_head))

    def test_open(self, family, critic, tmp_path):
        """The same run as without a gate, bit for bit."""
        trainer, _, _ = run(family, tmp_path / "gate", critic=critic, critic_min_explained_variance=-1e9)
        plain, _, _ = run(family, tmp_path / "plain", critic=critic)
        assert logged(trainer, "critic/gated") == [0.0, 0.0]
        assert all(math.isfinite(number) for number in logged(trainer, "critic/monte_carlo_explained_variance"))
        assert never_logged(plain, "critic/gated") and never_logged(plain, "critic/monte_carlo_explained_variance")
        ours, theirs = state_of(trainer.model), state_of(plain.model)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("critic", ["none", "monte_carlo"])
def test_needs_a_critic_that_learns(critic, tmp_path):
    with pytest.raises(ValueError, match="`critic_min_explained_variance=0.0` is a gate on a critic that learns"):
        settings(tmp_path, critic=critic, critic_min_explained_variance=0.0)


@pytest.mark.parametrize("threshold", [1.0, math.nan, math.inf])
def test_no_critic_explains_everything(threshold, tmp_path):
    with pytest.raises(ValueError, match="critic_min_explained_variance"):
        settings(tmp_path, critic_min_explained_variance=threshold)
