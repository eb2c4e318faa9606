"""A critic that starts from another model than the policy: a smaller one, and with frozen attention."""

import copy

import pytest
import torch
from transformers import Qwen2ForCausalLM, set_seed

from sapo_trl.critic import loading
from sapo_trl.critic.freezing import freeze_attention
from tests.testing_utils import logged, sapo_trainer, state_of, unmoved


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)


def model_of_layers(family, layers: int, seed: int = 0) -> Qwen2ForCausalLM:
    config = copy.deepcopy(family.config(family.tokenizer))
    config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
    set_seed(seed)
    return Qwen2ForCausalLM(config)


@TEXT_FAMILY
@pytest.mark.parametrize("saved", [False, True])
def test_one_layer_values_a_policy_of_three(family, saved, tmp_path):
    """From a model in memory, or from its folder."""
    small = model_of_layers(family, 1, seed=1)
    embedding = small.model.embed_tokens.weight.detach().clone()
    if saved:
        small.save_pretrained(tmp_path / "small")
    trainer = sapo_trainer(
        family,
        tmp_path / "run",
        model=model_of_layers(family, 3),
        trainer_kwargs={"value_model": str(tmp_path / "small") if saved else small},
    )
    critic = trainer.critic.value_head
    assert len(critic.backbone.layers) == 1 and len(trainer.model.model.layers) == 3
    assert torch.equal(critic.backbone.embed_tokens.weight, embedding)
    before = state_of(critic), state_of(trainer.model)
    trainer.train()
    assert not unmoved(before[0], critic) and len(unmoved(before[1], trainer.model)) < len(before[1])
    assert all(loss > 0 for loss in logged(trainer, "critic/loss"))


@TEXT_FAMILY
def test_the_policys_revision_is_not_the_critics(family, tmp_path, monkeypatch):
    """`revision` names a state of the policy's repository. A folder has none; on the Hub it would be another one."""
    family.build_model().save_pretrained(tmp_path / "policy")
    model_of_layers(family, 1).save_pretrained(tmp_path / "small")
    asked, from_pretrained = [], loading.AutoModel.from_pretrained

    def noted(path, **kwargs):
        asked.append((str(path), kwargs.get("revision")))
        return from_pretrained(path, **kwargs)

    monkeypatch.setattr(loading.AutoModel, "from_pretrained", noted)
    settings = {"model_init_kwargs": {"revision": "v2"}, "model": str(tmp_path / "policy")}
    sapo_trainer(family, tmp_path / "run", trainer_kwargs={"value_model": str(tmp_path / "small")}, **settings)
    sapo_trainer(family, tmp_path / "run", **settings)
    assert asked == [(str(tmp_path / "small"), None), (str(tmp_path / "policy"), "v2")]


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
def test_frozen_attention_stays_and_all_else_learns(family, tmp_path):
    trainer = sapo_trainer(family, tmp_path, freeze_critic_attention=True)
    critic = trainer.critic.value_head
    before = state_of(critic)
    trainer.train()
    still = set(unmoved(before, critic))
    attention = {name for name in before if any(part in name for part in ("self_attn.", ".attn."))}
    assert attention and still == attention
    # The policy's attention learns, and the optimizer has nothing frozen.
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    groups = trainer.critic.optimizer.param_groups
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


def test_a_model_without_attention_is_an_error():
    with pytest.raises(ValueError, match="`freeze_critic_attention=True`, but no module of a Sequential"):
        freeze_attention(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@TEXT_FAMILY
@pytest.mark.parametrize("critic", ["shared", "none"])
def test_only_a_separate_critic_has_attention(family, critic, tmp_path):
    with pytest.raises(ValueError, match=f"`freeze_critic_attention=True` with `critic='{critic}'`"):
        sapo_trainer(family, tmp_path, critic=critic, freeze_critic_attention=True)
