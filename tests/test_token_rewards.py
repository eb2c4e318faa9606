import pytest
import torch
from hypothesis import given
from torch.distributions import Categorical, kl_divergence

from sapo_trl.token_rewards import kl_estimate, outcome_token_rewards
from tests.strategies import masks, noise, seeds


@given(masks(), seeds)
def test_the_outcome_is_on_the_last_token(mask, seed):
    rewards = noise(mask[:, 0], seed).float()
    token_rewards = outcome_token_rewards(rewards, mask)
    for b in range(mask.size(0)):
        positions = mask[b].nonzero().flatten().tolist()
        expected = torch.zeros(mask.size(1))
        if positions:
            expected[positions[-1]] = rewards[b]
        assert torch.equal(token_rewards[b], expected)


def test_an_unscored_response_without_tokens_is_harmless():
    mask = torch.tensor([[False, False]])
    assert outcome_token_rewards(torch.tensor([torch.nan]), mask).eq(0).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_divergence(estimator):
    generator = torch.Generator().manual_seed(0)
    policy, reference = (Categorical(logits=torch.randn(7, generator=generator, dtype=torch.float64)) for _ in "pr")
    # The expectation over the policy, exactly: every token weighted with its probability.
    estimates = kl_estimate(policy.logits.unsqueeze(0), reference.logits.unsqueeze(0), estimator)
    expected = (policy.probs * estimates[0]).sum()
    torch.testing.assert_close(expected, kl_divergence(policy, reference))


def test_signs_of_the_estimators():
    logps, ref_logps = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-2.0, -0.5]])
    assert kl_estimate(logps, ref_logps, "k1").tolist() == [[1.0, -0.5]]
    assert kl_estimate(logps, ref_logps, "k2").tolist() == [[0.5, 0.125]]
    assert kl_estimate(logps, ref_logps, "k3").ge(0).all()


def test_unknown_estimator():
    with pytest.raises(ValueError, match="`estimator` must be one of .*'k4'"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")
