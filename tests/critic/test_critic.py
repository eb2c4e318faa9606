"""The critic beside the policy: what it may be made from, and its schedule over several calls of `train`."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sapo_trl import SegmentValueHead
from tests.testing_utils import sapo_trainer, state_of


pytestmark = pytest.mark.parametrize("family", ["qwen2"], indirect=True)


def test_every_call_of_train_has_a_schedule_of_its_own(family, tmp_path):
    trainer = sapo_trainer(family, tmp_path, lr_scheduler_type="linear", max_steps=2, critic_learning_rate=0.01)
    trainer.train()
    before = state_of(trainer.critic.value_head)
    trainer.train()
    rates = [entry["critic/learning_rate"] for entry in trainer.state.log_history if "critic/learning_rate" in entry]
    assert rates[-2:] == pytest.approx([0.01, 0.005])
    assert any(not torch.equal(before[name], now) for name, now in state_of(trainer.critic.value_head).items())


def test_adapters_of_a_value_model_are_merged(family, tmp_path):
    value_model = get_peft_model(family.build_model(seed=1), LoraConfig(target_modules=["q_proj"], r=2))
    trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"value_model": value_model})
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = SegmentValueHead.from_pretrained(tmp_path / "saved" / "critic")
    trained = trainer.critic.value_head.state_dict()
    assert loaded.state_dict().keys() == trained.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trained[name])


def test_the_policy_as_value_model_is_copied(family, tmp_path):
    model = family.build_model()
    trainer = sapo_trainer(family, tmp_path, model=model, trainer_kwargs={"value_model": model})
    assert not {id(p) for p in model.parameters()} & {id(p) for p in trainer.critic.value_head.parameters()}


def test_a_critic_on_the_policys_own_parameters_is_an_error(family, tmp_path):
    model = family.build_model()
    value_model = SegmentValueHead(model.config.hidden_size, model.model)
    with pytest.raises(ValueError, match="shares parameters with the policy"):
        sapo_trainer(family, tmp_path, model=model, trainer_kwargs={"value_model": value_model})


def test_a_frozen_critic_is_an_error(family, tmp_path):
    value_model = SegmentValueHead.from_policy(copy.deepcopy(family.build_model())).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        sapo_trainer(family, tmp_path, trainer_kwargs={"value_model": value_model})


def test_a_half_precision_critic_is_warned_about(family, tmp_path, caplog):
    sapo_trainer(family, tmp_path, model=family.build_model().bfloat16())
    assert "rounds most updates" in caplog.text
