"""Several updates of the critic for each step of the policy."""

import copy

import pytest
import torch
from peft import LoraConfig

from tests.testing_utils import fixed_rollout, logged, random_completions, sapo_trainer, state_of


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
CRITICS = pytest.mark.parametrize("critic", ["separate", "shared", "adapter", "ladder"])


def made(family, folder, critic="separate", **settings):
    kwargs = {"rollout_func": fixed_rollout(random_completions(3))}
    if critic == "adapter":
        kwargs["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 1, "optim": "sgd", "learning_rate": 0.02, **settings}
    return sapo_trainer(family, folder, critic=critic, trainer_kwargs=kwargs, **settings)


@TEXT_FAMILY
@pytest.mark.parametrize("updates", [1, 3])
def test_they_equal_a_loop(family, updates, tmp_path):
    """Gradient descent by hand, on the micro-batches and the targets of the step."""
    trainer = made(family, tmp_path, critic_updates_per_step=updates, critic_max_grad_norm=0.5)
    by_hand, batches, critic_loss = copy.deepcopy(trainer.critic.value_head), [], trainer.critic_loss

    def noted(batch, values):
        if not any(batch is other for other in batches):
            batches.append(batch)
        return critic_loss(batch, values)

    trainer.critic_loss = noted
    trainer.train()
    assert len(batches) == 2
    segments = sum(len(set(ids.tolist()) - {-1}) for batch in batches for ids in batch["segment_ids"])
    for _ in range(updates):
        total = 0.0
        for batch in batches:
            values = trainer.critic_forward(by_hand, batch)
            for row, ids in enumerate(batch["segment_ids"].tolist()):
                for t, segment in enumerate(ids):
                    if segment >= 0 and segment not in ids[:t]:
                        value, old, target = (
                            tensor[row, t] for tensor in (values, batch["old_values"], batch["returns"])
                        )
                        near_old = torch.clamp(value, old - 0.5, old + 0.5)
                        total = total + 0.5 * torch.maximum((value - target) ** 2, (near_old - target) ** 2)
        gradients = torch.autograd.grad(total / segments, list(by_hand.parameters()))
        norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient * min(1.0, 0.5 / norm.item())
    expected = state_of(by_hand)
    for name, tensor in state_of(trainer.critic.value_head).items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name


@TEXT_FAMILY
@CRITICS
def test_the_policy_takes_one_step_and_the_critic_more(family, critic, tmp_path):
    once = made(family, tmp_path / "once", critic, critic_learning_rate=0.002)
    start = state_of(once.critic.value_head)
    once.train()
    twice = made(family, tmp_path / "twice", critic, critic_learning_rate=0.002, critic_updates_per_step=2)
    twice.train()
    one, other = state_of(once.model), state_of(twice.model)
    of_policy = [name for name in one if ".critic." not in name]
    assert all(torch.equal(one[name], other[name]) for name in of_policy)
    one, other = state_of(once.critic.value_head), state_of(twice.critic.value_head)
    assert not [name for name in one if torch.equal(one[name], other[name])]
    moved = [(state["head.weight"] - start["head.weight"]).norm() for state in (one, other)]
    assert moved[1] > 1.5 * moved[0] > 0


@TEXT_FAMILY
def test_the_schedule_counts_the_policys_steps(family, tmp_path):
    settings = {"max_steps": 4, "lr_scheduler_type": "linear", "critic_lr_warmup_steps": 1}
    rates = [
        logged(trainer, "critic/learning_rate")
        for updates in (1, 2)
        if (trainer := made(family, tmp_path / str(updates), critic_updates_per_step=updates, **settings)).train()
    ]
    assert rates[0] == rates[1] and len(set(rates[0])) > 2


@TEXT_FAMILY
def test_the_warmup_has_them_too(family, tmp_path):
    once = made(family, tmp_path / "once", critic_warmup_steps=1)
    twice = made(family, tmp_path / "twice", critic_warmup_steps=1, critic_updates_per_step=2)
    policy = state_of(once.model)
    for trainer in (once, twice):
        trainer.train()
        assert all(torch.equal(policy[name], tensor) for name, tensor in state_of(trainer.model).items())
    assert not torch.equal(once.critic.value_head.head.weight, twice.critic.value_head.head.weight)


@TEXT_FAMILY
def test_an_update_that_is_not_finite_is_left_out(family, tmp_path, caplog):
    trainer = made(family, tmp_path, critic_updates_per_step=3)
    calls, critic_loss = [], trainer.critic_loss

    def spoiled(batch, values):
        calls.append(batch)
        loss = critic_loss(batch, values)
        return loss * torch.nan if len(calls) > 2 else loss  # from the second update on

    trainer.critic_loss = spoiled
    trainer.train()
    assert len(calls) == 4  # and no third update
    assert logged(trainer, "skipped_steps") == [0.0]
    assert "The critic's updates 2 to 3 of this step are left out" in caplog.text
    assert all(tensor.isfinite().all() for tensor in state_of(trainer.critic.value_head).values())
    expected = made(family, tmp_path / "once")
    expected.train()
    assert torch.equal(expected.critic.value_head.head.weight, trainer.critic.value_head.head.weight)


@TEXT_FAMILY
def test_an_update_that_is_left_out_is_no_skipped_step(family, tmp_path):
    """The policy's step was taken, so it is none of those in a row that stop a run."""
    trainer = made(family, tmp_path, critic_updates_per_step=2, max_steps=2, max_skipped_steps=2)
    calls, critic_loss = [], trainer.critic_loss

    def spoiled(batch, values):
        calls.append(batch)
        return critic_loss(batch, values) * (torch.nan if len(calls) > 2 else 1.0)  # also in the next step

    trainer.critic_loss = spoiled
    trainer.train()
    assert logged(trainer, "skipped_steps") == [0.0, 1.0]
