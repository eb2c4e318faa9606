"""Optimizers with one set of weights for training and one for evaluation: the critic's switches with the policy's."""

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainerCallback

from sapo_trl.callbacks import RolloutCallback
from tests.testing_utils import fixed_rollout, random_completions, sapo_trainer, state_of


CRITICS = pytest.mark.parametrize("critic", ["shared", "separate", "adapter", "ladder"])
pytestmark = pytest.mark.parametrize("family", ["qwen2"], indirect=True)


class ScheduleFreeSGD(torch.optim.Optimizer):
    """
    Schedule-free SGD with the interface of the package `schedulefree`.

    Gradients are taken at `y`, between the fast weights `z` and their average `x`. A parameter is `y` in training and
    `x` in evaluation.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "train_mode": False, "k": 0, "weight_decay": 0.0})

    @torch.no_grad()
    def _move(self, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == train_mode:
                continue
            group["train_mode"] = train_mode
            momentum = group["momentum"]
            for parameter in group["params"]:
                if "z" in self.state[parameter]:
                    weight = 1 - momentum if train_mode else 1 - 1 / momentum
                    parameter.lerp_(self.state[parameter]["z"], weight)

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("Optimizer was not in train mode when step is called.")
            share, momentum = 1 / (group["k"] + 1), group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                z = self.state[parameter].setdefault("z", parameter.clone())
                parameter.lerp_(z, 1 - 1 / momentum)  # from y to x
                z.sub_(parameter.grad, alpha=group["lr"])
                parameter.lerp_(z, share).lerp_(z, 1 - momentum)
            group["k"] += 1


class Modes(RolloutCallback):
    """The mode of the critic's optimizer, and a critic's weight, in each rollout."""

    def __init__(self):
        self.seen = []

    def on_rollout(self, args, state, control, rollout, metrics):
        optimizer = self.trainer.critic.optimizer
        modes = {group["train_mode"] for group in optimizer.param_groups}
        self.seen.append((rollout.mode, modes, self.trainer.critic.value_head.head.weight.detach().clone()))


class SaveAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == self.step


@pytest.fixture
def make(family, monkeypatch):
    kinds = staticmethod(lambda args, model=None: (ScheduleFreeSGD, {"lr": args.learning_rate}))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", kinds)

    def make(folder, critic, **settings):
        callbacks = settings.pop("callbacks", [])
        kwargs = {"eval_dataset": family.dataset().select(range(2)), "callbacks": callbacks}
        if critic == "adapter":
            kwargs["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        defaults = {
            "max_steps": 4,
            "lr_scheduler_type": "constant",
            "learning_rate": 0.05,
            "critic_learning_rate": 0.05,
            "beta": 0.0,
            "per_device_eval_batch_size": 2,
            # A rollout is one batch, trained on twice: the order of its rows, which is random, does not matter.
            "num_mini_batches": 1,
            "num_iterations": 2,
        }
        return sapo_trainer(
            family,
            folder,
            critic=critic,
            trainer_kwargs={"rollout_func": fixed_rollout(random_completions()), **kwargs},
            **defaults | settings,
        )

    return make


def weights(trainer) -> dict[str, torch.Tensor]:
    """The critic's and the policy's, as in training."""
    trainer.critic.at("train")
    trainer.optimizer.train()
    return state_of(trainer.critic.value_head) | {f"policy.{n}": t for n, t in state_of(trainer.model).items()}


@CRITICS
def test_rollouts_are_valued_in_the_policys_mode(make, critic, tmp_path):
    modes = Modes()
    trainer = make(tmp_path, critic, eval_strategy="steps", eval_steps=1, callbacks=[modes])
    modes.trainer = trainer
    before = state_of(trainer.critic.value_head)
    trainer.train()
    assert not torch.equal(before["head.weight"], trainer.critic.value_head.head.weight)
    assert {mode for mode, *_ in modes.seen} == {"train", "eval"}
    assert all(train_modes == {mode == "train"} for mode, train_modes, _ in modes.seen)
    # Both sets of weights were used: after a rollout in training, an evaluation without a step has other weights.
    evaluated = [weight for mode, _, weight in modes.seen if mode == "eval"]
    trainer.critic.at("eval")
    assert torch.equal(evaluated[-1], trainer.critic.value_head.head.weight)
    trainer.critic.at("train")
    assert not torch.equal(evaluated[-1], trainer.critic.value_head.head.weight)


@CRITICS
def test_evaluations_and_checkpoints_change_nothing(make, critic, tmp_path):
    plain = make(tmp_path / "plain", critic)
    plain.train()
    expected = weights(plain)
    # The checkpoint of step 3 is written within a rollout, after an evaluation.
    settings = {"eval_strategy": "steps", "eval_steps": 1, "callbacks": [SaveAt(3)]}
    whole = make(tmp_path / "whole", critic, **settings)
    whole.train()
    resumed = make(tmp_path / "whole", critic, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for trainer in (whole, resumed):
        found = weights(trainer)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)
