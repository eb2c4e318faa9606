"""Settings of tiny runs, and samples for them."""

import pytest
import torch
from datasets import Dataset

from sapo_trl.recipes import (
    DPOPConfig,
    ReSTEMConfig,
    sample_responses,
)
from tests.testing_utils import QUIET_ON_CPU, length_reward


TEXT = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
TEXT_AND_IMAGES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
EVERY_FAMILY = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl", "qwen3_vl"], indirect=True)
TINY_RUN = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    **QUIET_ON_CPU,
    "num_samples": 4,
    "max_completion_length": 6,
    # A tiny random model does not end its responses.
    "keep_truncated": True,
    "reward_threshold": 0.4,
}


def restem_config(output_dir, **settings) -> ReSTEMConfig:
    return ReSTEMConfig(str(output_dir), **{**TINY_RUN, **settings})


def dpop_config(output_dir, **settings) -> DPOPConfig:
    return DPOPConfig(str(output_dir), **{**TINY_RUN, **settings})


def sample(family, n=3, num_samples=2, *, model=None, dataset=None, reward=length_reward, **settings) -> Dataset:
    settings = {"max_completion_length": 5, "disable_tqdm": True, **settings}
    model = family.build_model() if model is None else model
    dataset = family.dataset(n) if dataset is None else dataset
    return sample_responses(model, family.processing_class, dataset, reward, num_samples, **settings)


def scripted(model, family, responses: list[str]):
    """Let a model generate given texts, in turn, whatever it is asked."""
    remaining = iter(responses)

    def generate(input_ids, generation_config, **inputs):
        texts = [next(remaining) for _ in input_ids]
        ids = family.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, ids], 1)

    model.generate = generate
    return model


def table(*rows) -> Dataset:
    names = ("prompt_index", "response", "reward", "finished")
    return Dataset.from_dict({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


def picture_run(**settings) -> dict:
    return {
        **TINY_RUN,
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "num_samples": 16,
        "max_completion_length": 64,
        "sampling_batch_size": 256,
        "sampling_temperature": 1.0,
        "keep_truncated": False,
        "reward_threshold": 0.0,
        **settings,
    }
