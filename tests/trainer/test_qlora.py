"""A policy of two adapters, its own and the critic's, on a base model in 4 bits."""

import importlib.util
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from sapo_trl import SAPOTrainer
from tests.critic.test_adapter import LORA, parameters_by_owner
from tests.testing_utils import fixed_rollout, length_reward, logged, random_completions, sapo_config


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: `make test-qlora`"
)
FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


def auto_class(family):
    return AutoModelForImageTextToText if family.takes_images else AutoModelForCausalLM


def qlora_trainer(family, folder, trainer_kwargs=None, **settings) -> SAPOTrainer:
    """From a folder, as users have it; TRL loads it in 4 bits."""
    four_bits = {**FOUR_BITS, "bnb_4bit_compute_dtype": torch.bfloat16 if settings.get("bf16") else torch.float32}
    kwargs = {
        "model": str(base_folder(family, folder)),
        "quantization_config": BitsAndBytesConfig(**four_bits),
        "peft_config": LoraConfig(**LORA),
        **(trainer_kwargs or {}),
    }
    return SAPOTrainer(
        reward_funcs=length_reward,
        args=sapo_config(folder / "run", **{"critic": "adapter", "max_steps": 4, "beta": 0.1, **settings}),
        train_dataset=family.dataset(),
        processing_class=family.processing_class,
        rollout_func=fixed_rollout(random_completions()),
        **kwargs,
    )


def base_folder(family, folder):
    base = folder / "base"
    if not base.exists():
        family.build_model().save_pretrained(base)
    return base


def in_four_bits(family, folder):
    return auto_class(family).from_pretrained(
        base_folder(family, folder), quantization_config=BitsAndBytesConfig(**FOUR_BITS), dtype=torch.float32
    )


def quantized_layers(policy) -> list[str]:
    return [name for name, parameter in policy.named_parameters() if parameter.dtype == torch.uint8]


class TestTraining:
    @FAMILIES
    @pytest.mark.parametrize(
        "settings", [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "bf16": True}]
    )
    def test_both_adapters_learn_and_the_base_stays(self, family, settings, tmp_path):
        trainer = qlora_trainer(family, tmp_path, **settings)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        assert len(quantized_layers(policy)) >= 14  # seven in each of two layers
        before = parameters_by_owner(policy)
        head = trainer.critic.value_head.head
        assert head.weight.dtype == torch.float32
        head_before = head.weight.detach().clone()
        trainer.train()
        after = parameters_by_owner(policy)
        assert all(torch.equal(tensor, after["base"][name]) for name, tensor in before["base"].items())
        for owner in ("default", "critic"):
            # Every tensor, that is both factors of every layer: a graph that is cut somewhere leaves some of them.
            unmoved = [name for name, tensor in before[owner].items() if torch.equal(tensor, after[owner][name])]
            assert before[owner] and unmoved == [], owner
        assert not torch.equal(head.weight, head_before)
        for name in ("policy_loss", "critic/loss", "critic/grad_norm", "kl"):
            assert all(math.isfinite(value) for value in logged(trainer, name)) and logged(trainer, name), name
        assert logged(trainer, "skipped_steps") == [0] * 4

    @TEXT_FAMILY
    def test_critics_gradient_is_that_on_the_dequantized_base(self, family, tmp_path):
        """One step of plain gradient descent on the base in 4 bits, and on one with what these bits stand for."""
        settings = {"optim": "sgd", "max_steps": 1, "num_mini_batches": 1, "beta": 0.0, "learning_rate": 0.0}
        settings |= {"critic_max_grad_norm": 1e9, "critic_learning_rate": 1.0}
        plain = in_four_bits(family, tmp_path).dequantize()
        assert quantized_layers(plain) == []
        runs = []
        for kwargs in ({}, {"model": plain, "quantization_config": None}):
            trainer = qlora_trainer(family, tmp_path, kwargs, **settings)
            before = parameters_by_owner(trainer.accelerator.unwrap_model(trainer.model))["critic"]
            trainer.train()
            after = parameters_by_owner(trainer.accelerator.unwrap_model(trainer.model))["critic"]
            after["head"] = trainer.critic.value_head.head.weight.detach()
            runs.append(after)
        assert any(not torch.equal(tensor, runs[0][name]) for name, tensor in before.items())
        for name, tensor in runs[1].items():
            torch.testing.assert_close(runs[0][name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    @TEXT_FAMILY
    @pytest.mark.parametrize("critic", ["shared", "ladder"])
    def test_critic_that_reads_the_policy(self, family, critic, tmp_path):
        trainer = qlora_trainer(family, tmp_path, critic=critic)
        assert {parameter.dtype for parameter in trainer.critic.value_head.parameters()} == {torch.float32}
        head = trainer.critic.value_head.head.weight.detach().clone()
        before = parameters_by_owner(trainer.accelerator.unwrap_model(trainer.model))
        trainer.train()
        after = parameters_by_owner(trainer.accelerator.unwrap_model(trainer.model))
        assert not torch.equal(trainer.critic.value_head.head.weight, head)
        assert all(torch.equal(tensor, after["base"][name]) for name, tensor in before["base"].items())
        assert all(not torch.equal(tensor, after["default"][name]) for name, tensor in before["default"].items())

    @TEXT_FAMILY
    def test_separate_critic_in_a_floating_point_dtype(self, family, tmp_path):
        """Of a policy in 4 bits, whichever way that was said."""
        base = str(base_folder(family, tmp_path))
        in_kwargs = {"model_init_kwargs": {"quantization_config": BitsAndBytesConfig(**FOUR_BITS)}}
        for settings, kwargs in (({}, {}), (in_kwargs, {"quantization_config": None})):
            with pytest.raises(ValueError, match="quantized policy cannot be copied"):
                qlora_trainer(family, tmp_path, kwargs, critic="separate", **settings)
            kwargs = {**kwargs, "value_model": base}
            trainer = qlora_trainer(family, tmp_path, kwargs, critic="separate", max_steps=2, **settings)
            assert quantized_layers(trainer.accelerator.unwrap_model(trainer.model))
            critic = trainer.critic.value_head
            before = {name: tensor.detach().clone() for name, tensor in critic.learned_parameters()}
            assert {tensor.dtype for tensor in before.values()} == {torch.float32}
            trainer.train()
            moved = [name for name, tensor in critic.learned_parameters() if not torch.equal(tensor, before[name])]
            assert len(moved) > len(before) / 2  # embeddings of tokens that did not occur stay

    @TEXT_FAMILY
    def test_a_value_model_in_four_bits_is_refused(self, family, tmp_path):
        in_memory, folder = in_four_bits(family, tmp_path), tmp_path / "four_bits"
        in_memory.save_pretrained(folder)
        for value_model in (in_memory, str(folder)):
            with pytest.raises(ValueError, match="`value_model` is quantized"):
                qlora_trainer(family, tmp_path, {"value_model": value_model}, critic="separate")


class TestSaving:
    @FAMILIES
    def test_adapters_load_with_plain_peft_and_say_the_same(self, family, tmp_path):
        trainer = qlora_trainer(family, tmp_path)
        trainer.train()
        saved = tmp_path / "saved"
        trainer.save_model(str(saved))
        trained = parameters_by_owner(trainer.accelerator.unwrap_model(trainer.model))
        ids = torch.tensor([[30, 31, 32]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for owner, folder in (("default", saved), ("critic", saved / "critic")):
            loaded = PeftModel.from_pretrained(in_four_bits(family, tmp_path), folder)
            found = {name: tensor for name, tensor in loaded.named_parameters() if "lora_" in name}
            assert len(found) == len(trained[owner])
            for name, tensor in found.items():
                assert torch.equal(tensor, trained[owner][name.replace(".default.", f".{owner}.")].float()), name
        # By hand: the last of these with the head that lies beside it, and the critic as it is.
        head = load_file(saved / "critic" / "value_head.safetensors")
        # In training mode, without dropout. In evaluation mode bitsandbytes packs weights for a CPU with bfloat16
        # instructions, and their width must then be a multiple of 32.
        loaded.train()
        trainer.model.train()
        with torch.no_grad():
            hidden = loaded.get_base_model().base_model(**inputs).last_hidden_state
            expected = (hidden @ head["weight"].T).squeeze(2) + head["bias"]
            values = trainer.critic.value_head(**inputs)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)

    @TEXT_FAMILY
    def test_resume_equals_an_uninterrupted_run(self, family, tmp_path):
        settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "critic_learning_rate": 1e-2}
        whole = qlora_trainer(family, tmp_path, **settings)
        whole.train()
        resumed = qlora_trainer(family, tmp_path, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        expected = parameters_by_owner(whole.accelerator.unwrap_model(whole.model))
        found = parameters_by_owner(resumed.accelerator.unwrap_model(resumed.model))
        for owner in ("default", "critic"):
            for name, tensor in expected[owner].items():
                torch.testing.assert_close(found[owner][name], tensor, rtol=0, atol=1e-6, msg=name)
