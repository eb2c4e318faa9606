"""Every policy that training saves loads with plain transformers and PEFT, and is the one that was trained."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.testing_utils import Family, Recorder, sapo_trainer


LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
ADAPTERS = {
    "full": None,
    "tied embeddings": None,
    "LoRA": LoraConfig(**LORA),
    "LoRA, tied embeddings": LoraConfig(**LORA),
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "modules_to_save": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "modules_to_save, both embeddings": LoraConfig(**LORA, modules_to_save=["lm_head", "embed_tokens"]),
    "trained tokens": LoraConfig(**LORA, trainable_token_indices=[5, 6, 7]),
    "bias and rank-stabilised": LoraConfig(**LORA, bias="lora_only", use_rslora=True),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
LEARNING_RATE = {"prefix tuning": 0.5, "prompt tuning": 0.5}
WITHOUT_REFERENCE = ("bias and rank-stabilised",)


def auto_class(family: Family):
    return AutoModelForImageTextToText if family.takes_images else AutoModelForCausalLM


def base_folder(family: Family, folder: Path, tied: bool) -> Path:
    model = family.build_model()
    if tied:
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = True
        model.tie_weights()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(folder)
    family.processing_class.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model, family: Family) -> torch.Tensor:
    ids = torch.arange(20, 60).view(2, 20)
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -20:]  # without virtual tokens


CASES = [("qwen2", kind, "separate") for kind in ADAPTERS]
CASES += [("qwen2", "full", "shared"), ("qwen2", "LoRA", "shared"), ("qwen2", "LoRA", "adapter")]
CASES += [("qwen2", "modules_to_save", "adapter"), ("qwen2", "DoRA", "adapter")]
CASES += [("qwen2", "prefix tuning", "shared"), ("qwen2", "prefix tuning", "ladder"), ("qwen2", "LoRA", "ladder")]
CASES += [("qwen2_5_vl", kind, "separate") for kind in ("full", "LoRA", "modules_to_save")]


@pytest.mark.parametrize(("family", "kind", "critic"), CASES, indirect=["family"])
def test_a_saved_policy_is_the_trained_one(family, kind, critic, tmp_path):
    auto = auto_class(family)
    base = base_folder(family, tmp_path / "base", tied="tied" in kind)
    config = ADAPTERS[kind]
    trainer = sapo_trainer(
        family,
        tmp_path / "run",
        model=auto.from_pretrained(base),
        critic=critic,
        save_strategy="steps",
        save_steps=2,
        learning_rate=LEARNING_RATE.get(kind, 0.05),
        **({"beta": 0.0} if kind in WITHOUT_REFERENCE else {}),
        trainer_kwargs={} if config is None else {"peft_config": config},
    )
    trainer.train()
    trainer.save_model()
    trained = logits(trainer.accelerator.unwrap_model(trainer.model), family)
    assert (trained - logits(auto.from_pretrained(base), family)).abs().max() > 0.01  # something was learned
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        if config is None:
            loaded, report = auto.from_pretrained(folder, output_loading_info=True)
            assert not any(report.values()), report
        else:
            loaded = PeftModel.from_pretrained(auto.from_pretrained(base), folder)
            assert loaded.active_adapters == ["default"]
        torch.testing.assert_close(logits(loaded, family), trained, rtol=0, atol=1e-5)


def plain_logps(model, ids: torch.Tensor, number: int) -> torch.Tensor:
    """Of the last `number` tokens of one row, by a forward of nothing else."""
    with torch.no_grad():
        logps = model.eval()(input_ids=ids[None]).logits[0, -number - 1 : -1].log_softmax(-1)
    return logps.gather(1, ids[-number:, None])[:, 0]


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
@pytest.mark.parametrize("kind", ["LoRA", "prefix tuning", "prompt tuning", "p-tuning"])
def test_log_probabilities_are_the_ones_of_the_policy_with_its_adapter(family, kind, tmp_path):
    recorder = Recorder()
    settings = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 4, "num_mini_batches": 1}
    kwargs = {"peft_config": ADAPTERS[kind], "callbacks": [recorder]}
    trainer = sapo_trainer(family, tmp_path, trainer_kwargs=kwargs, critic="shared", **settings)
    trainer.train()
    model, (rollout,) = trainer.accelerator.unwrap_model(trainer.model), recorder.rollouts
    assert len(rollout.completion_ids) == 4
    for row, mask in enumerate(rollout.segments.mask):
        ids = torch.cat([rollout.prompt_ids[row][rollout.prompt_mask[row].bool()], rollout.completion_ids[row][mask]])
        expected = plain_logps(model, ids, int(mask.sum()))
        torch.testing.assert_close(rollout.logps[row][mask], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "is_encoded"),
    [
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), False),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), False),
        (
            PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=4
            ),
            True,
        ),
        (PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=4), True),
    ],
)
@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
def test_virtual_tokens_that_cannot_be_resumed_are_said_before_training(family, config, is_encoded, tmp_path, caplog):
    sapo_trainer(family, tmp_path, trainer_kwargs={"peft_config": config})
    assert ("no run can be resumed" in caplog.text) == is_encoded
