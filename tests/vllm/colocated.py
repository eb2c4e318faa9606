"""Trains with TRL's colocated vLLM, in a process of its own: engines keep their memory and process group."""

import functools
import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from trl.generation import vllm_generation
from vllm import _custom_ops

from sapo_trl.embedded import build_processor, build_tokenizer
from tests.testing_utils import FAMILIES, sapo_trainer
from tests.vllm.servers import build_text_model, save_for_vllm


# On a CPU, vLLM 0.32 packs the weights for oneDNN and drops them: TRL has nothing left to write to. Without oneDNN
# they stay, as on a GPU.
_custom_ops._supports_onednn = False
# The engine's own choices are bfloat16 and minutes of compilation.
vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True, dtype="float32")


def main(folder: Path, kind: str) -> None:
    """Four steps on text or pictures, from `folder/model`; writes the trainer's log to `folder/log.json`."""
    if kind == "pictures":
        family = FAMILIES["qwen2_5_vl"](build_processor(build_tokenizer()))
        model, load = family.build_model(), AutoModelForImageTextToText.from_pretrained
    else:
        family = FAMILIES["qwen2"](build_tokenizer())
        model, load = build_text_model(family), AutoModelForCausalLM.from_pretrained
    save_for_vllm(model, family.processing_class, folder / "model")
    settings = {"max_steps": 4, "num_generations": 2, "per_device_train_batch_size": 4, "learning_rate": 0.03}
    settings |= {"num_mini_batches": 1, "temperature": 0.8, "max_completion_length": 12, "logging_steps": 1}
    settings |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 256}
    trainer = sapo_trainer(family, folder / "out", model=load(folder / "model", dtype="float32"), **settings)
    if kind == "text, weights sent once only":
        trainer.vllm_generation.sync_weights = lambda: None  # the engine has loaded the folder's
    trainer.train()
    (folder / "log.json").write_text(json.dumps([entry for entry in trainer.state.log_history if "loss" in entry]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
