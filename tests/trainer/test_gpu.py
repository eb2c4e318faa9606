"""Training steps in bfloat16 on a GPU: what moves, and that losses are those of the CPU in float32."""

import math

import pytest
import torch
from peft import LoraConfig

from tests.critic.test_adapter import LORA
from tests.testing_utils import fixed_rollout, logged, random_completions, sapo_trainer, state_of, unmoved


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
ON_GPU = {"use_cpu": False, "bf16": True, "gradient_checkpointing": True}


def train(family, folder, critic, **settings):
    kwargs = {"rollout_func": fixed_rollout(random_completions())}
    if critic == "adapter":
        kwargs["peft_config"] = LoraConfig(**LORA)
    # Every token is a segment: which of two close entropies is larger depends on the precision.
    settings = {"segmentation": "token", "critic": critic, "beta": 0.1, **settings}
    trainer = sapo_trainer(family, folder, trainer_kwargs=kwargs, **settings)
    policy, critic_module = trainer.model, trainer.critic.value_head
    before = state_of(policy), {name: p.detach().clone() for name, p in critic_module.learned_parameters()}
    trainer.train()
    return trainer, before


@FAMILIES
@pytest.mark.parametrize("critic", ["separate", "shared", "adapter", "ladder"])
def test_steps_in_bfloat16(family, critic, tmp_path, monkeypatch):
    trainer, (policy_before, critic_before) = train(family, tmp_path / "gpu", critic, max_steps=4, **ON_GPU)
    assert {parameter.device.type for parameter in trainer.model.parameters()} == {"cuda"}
    assert (
        trainer.critic.value_head.head.weight.is_cuda and trainer.critic.value_head.head.weight.dtype == torch.float32
    )
    still = unmoved(policy_before, trainer.model)
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert len(set(still) & set(trained)) < len(trained) / 2
    moved = [n for n, p in trainer.critic.value_head.learned_parameters() if not torch.equal(p, critic_before[n])]
    assert len(moved) > len(critic_before) / 2
    assert logged(trainer, "skipped_steps") == [0] * 4
    # The first step's numbers follow from the seed alone; bfloat16 has three digits.
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)  # set by the first run's arguments
    cpu, _ = train(family, tmp_path / "cpu", critic, max_steps=1)
    for name in ("critic/loss", "entropy", "reward"):
        assert math.isclose(logged(trainer, name)[0], logged(cpu, name)[0], rel_tol=0.02), name


@FAMILIES
def test_generation_on_the_gpu(family, tmp_path):
    trainer = sapo_trainer(family, tmp_path, critic="shared", **ON_GPU)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(math.isfinite(value) for value in logged(trainer, "policy_loss"))
    assert torch.cuda.max_memory_allocated() > 0
