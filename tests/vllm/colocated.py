"""Trains with TRL's colocated vLLM, in a process of its own: engines keep their memory and process group."""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from sapo_trl.embedded import build_processor, build_tokenizer
from sapo_trl.trainer.trl import generation
from tests.testing_utils import FAMILIES, Recorder, sapo_trainer
from tests.vllm.servers import build_text_model, save_for_vllm


def main(folder: Path, kind: str) -> None:
    """Four steps on text or pictures; writes `log.json`, the trainer's log. `folder/model` is the policy's folder."""
    if kind == "text":
        family = FAMILIES["qwen2"](build_tokenizer())
        save_for_vllm(build_text_model(family), family.processing_class, folder / "model")
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    else:
        family = FAMILIES["qwen2_5_vl"](build_processor(build_tokenizer()))
        save_for_vllm(family.build_model(), family.processing_class, folder / "model")
        model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype="float32")
    if kind == "expanded pictures":
        generation.TRL_EXPANDS_PLACEHOLDERS_TWICE = False
    settings = {"max_steps": 4, "num_generations": 2, "per_device_train_batch_size": 4, "learning_rate": 0.03}
    settings |= {"num_mini_batches": 1, "temperature": 0.8, "max_completion_length": 12, "logging_steps": 1}
    settings |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 256}
    if kind == "never again":
        settings["max_sampler_logp_difference"] = None
    recorder = Recorder()
    trainer = sapo_trainer(family, folder / "out", model=model, trainer_kwargs={"callbacks": [recorder]}, **settings)
    if kind == "never again":
        trainer.vllm_generation.sync_weights = lambda: None
    trainer.train()
    (folder / "log.json").write_text(json.dumps([entry for entry in trainer.state.log_history if "loss" in entry]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
