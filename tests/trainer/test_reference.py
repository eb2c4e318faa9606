"""The reference model: its log-probabilities, its updates and the KL penalty."""

import pytest
import torch
from peft import LoraConfig

from tests.testing_utils import (
    Recorder,
    fixed_rollout,
    logged,
    random_completions,
    sapo_trainer,
    state_of,
    unmoved,
)


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
BOTH_FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)


class TestReference:
    @TEXT_FAMILY
    def test_none(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path, beta=0.0)
        trainer.train()
        assert trainer.ref_model is None and "kl" not in trainer.state.log_history[0]

    @BOTH_FAMILIES
    def test_frozen_copy_of_a_model_in_memory(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path, beta=0.1, max_steps=4)
        reference = state_of(trainer.ref_model)
        expected = state_of(family.build_model())
        assert all(torch.equal(tensor, expected[name]) for name, tensor in reference.items())
        assert not {p.data_ptr() for p in trainer.ref_model.parameters()} & {
            p.data_ptr() for p in trainer.model.parameters()
        }
        assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())
        assert trainer.beta == trainer.args.beta == 0.1
        trainer.train()
        assert len(unmoved(reference, trainer.ref_model)) == len(reference)
        first, second = logged(trainer, "kl")
        assert first == 0.0 and abs(second) > 1e-3

    @TEXT_FAMILY
    def test_loaded_by_name_is_the_same(self, family, tmp_path):
        family.build_model().save_pretrained(tmp_path / "model")
        runs = {}
        for name, model in (("memory", family.build_model()), ("disk", str(tmp_path / "model"))):
            trainer = sapo_trainer(
                family,
                tmp_path / name,
                model=model,
                beta=0.1,
                max_steps=4,
                trainer_kwargs={
                    "rollout_func": fixed_rollout(random_completions(5)),
                    "value_model": family.build_model(),
                },
            )
            trainer.train()
            runs[name] = logged(trainer, "kl")
        assert runs["disk"][0] == 0.0 and abs(runs["disk"][1]) > 1e-3
        assert runs["disk"] == pytest.approx(runs["memory"], rel=1e-4)

    @TEXT_FAMILY
    def test_synchronised_reference_needs_a_name(self, family, tmp_path):
        with pytest.raises(ValueError, match="`sync_ref_model=True`.*save this one first"):
            sapo_trainer(family, tmp_path, beta=0.1, sync_ref_model=True)

    @pytest.mark.parametrize(
        ("family", "critic"),
        [
            ("qwen2", "separate"),
            ("qwen2", "shared"),
            ("qwen2", "none"),
            pytest.param("qwen2_5_vl", "separate", marks=pytest.mark.slow),
            ("qwen2_5_vl", "shared"),
            pytest.param("qwen2_5_vl", "none", marks=pytest.mark.slow),
        ],
        indirect=["family"],
    )
    def test_adapter_switched_off(self, family, critic, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            beta=0.1,
            max_steps=4,
            temperature=0.9,
            trainer_kwargs={
                "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
                "callbacks": [recorder],
                "rollout_func": fixed_rollout(random_completions(5)),
            },
        )
        assert trainer.ref_model is None
        before = state_of(trainer.model)
        critic_before = state_of(trainer.critic.value_head) if trainer.critic else {}
        assert not any("lora" in name for name in critic_before)
        trainer.train()
        trained = {name for name in before if "lora" in name}
        assert set(unmoved(before, trainer.model)) == before.keys() - trained
        if trainer.critic:
            assert unmoved(critic_before, trainer.critic.value_head) == []

        # The KL of the second rollout, against the plain model that the adapter was put on.
        if family.takes_images:
            return
        rollout, plain = recorder.rollouts[1], family.build_model()
        differences = []
        for row in range(4):
            prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()]
            completion = rollout.completion_ids[row][rollout.segments.mask[row]]
            with torch.no_grad():
                logits = plain(torch.cat([prompt, completion]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1] / 0.9
            logps = torch.log_softmax(logits, -1).gather(1, completion.unsqueeze(1)).squeeze(1)
            differences.append(rollout.logps[row][: len(completion)] - logps)
        expected = torch.cat(differences).mean().item()
        assert abs(expected) > 1e-3
        assert logged(trainer, "kl") == pytest.approx([0.0, expected], abs=1e-4)
