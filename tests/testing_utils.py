"""Tiny models and runs for the trainer's tests, and slow references to compare with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    TrainerCallback,
    set_seed,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOTrainer
from trl.chat_template_utils import qwen3_vl_chat_template

from sapo_trl import SAPOConfig, SAPOTrainer, Segments
from sapo_trl.callbacks import RolloutCallback
from sapo_trl.data import to_prompts
from sapo_trl.embedded import build_config, make_problems
from sapo_trl.rollouts.types import SegmentedRollout


class Qwen3VLImageTextProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without its video part, which transformers can only build with torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)


def build_qwen3_vl_processor(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLImageTextProcessor:
    # 64 by 64 pixels in patches of 16, merged two by two: four image tokens.
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 64**2, "longest_edge": 64**2}, patch_size=16)
    return Qwen3VLImageTextProcessor(image_processor, tokenizer, chat_template=qwen3_vl_chat_template)


@dataclass
class Family:
    """A model family with its tokenizer or processor."""

    name: str
    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    config: Callable[[PreTrainedTokenizerBase], Any]
    model_class: type[PreTrainedModel]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    @property
    def takes_images(self) -> bool:
        return isinstance(self.processing_class, ProcessorMixin)

    def build_model(self, seed: int = 0) -> PreTrainedModel:
        set_seed(seed)
        return self.model_class(self.config(self.tokenizer))

    def dataset(self, n: int = 8) -> Dataset:
        return image_dataset(n) if self.takes_images else text_dataset(n)


def _qwen2_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _qwen2_5_vl_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLConfig:
    # The embedded task's, but smaller.
    config = build_config(tokenizer).to_dict()
    text, vision = config["text_config"], config["vision_config"]
    del text["layer_types"]  # derived from the number of layers
    text |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    vision |= {"out_hidden_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    return Qwen2_5_VLConfig.from_dict(config)


def _qwen3_vl_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLConfig:
    token_id = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 256,
            "initializer_range": 0.08,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
                "rope_theta": 10_000.0,
            },
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.08,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        initializer_range=0.08,
    )


FAMILIES: dict[str, Callable[[Any], Family]] = {
    "qwen2": lambda processing: Family("qwen2", processing, _qwen2_config, Qwen2ForCausalLM),
    "qwen2_5_vl": lambda processing: Family(
        "qwen2_5_vl", processing, _qwen2_5_vl_config, Qwen2_5_VLForConditionalGeneration
    ),
    "qwen3_vl": lambda processing: Family("qwen3_vl", processing, _qwen3_vl_config, Qwen3VLForConditionalGeneration),
}


@functools.cache
def image_dataset(n: int = 8) -> Dataset:
    return to_prompts(make_problems(n))


@functools.cache
def text_dataset(n: int = 8) -> Dataset:
    """Prompts of unequal lengths, so that batches are padded."""
    questions = [f"Find {'+'.join(['AB', 'BC', 'CD', 'DA'][: 1 + i % 4])}." for i in range(n)]
    prompts = [[{"role": "user", "content": question}] for question in questions]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(i) for i in range(n)]})


def length_reward(completion_ids, **kwargs) -> list[float]:
    """Not constant, and known from the token ids alone."""
    return [(sum(ids) % 7) / 7 for ids in completion_ids]


QUIET_ON_CPU: dict[str, Any] = {
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Settings of every tiny run: on a CPU, all steps logged, nothing saved or shown."""


def sapo_config(output_dir, **overrides) -> SAPOConfig:
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": None if {"steps_per_generation", "generation_batch_size"} & overrides.keys() else 2,
        "num_generations": 1,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 0.1,
        "weight_decay": 0.0,  # would move parameters without a gradient
        "critic_learning_rate": 0.1,
        **QUIET_ON_CPU,
        **overrides,
    }
    return SAPOConfig(output_dir=str(output_dir), **settings)


def sapo_trainer(family: Family, output_dir, *, model=None, trainer_kwargs=None, **overrides) -> SAPOTrainer:
    """A trainer on a family's tiny model and data; `overrides` are settings of [`SAPOConfig`]."""
    kwargs = {
        "reward_funcs": length_reward,
        "train_dataset": family.dataset(),
        "processing_class": family.processing_class,
        **(trainer_kwargs or {}),
    }
    return SAPOTrainer(
        model=family.build_model() if model is None else model, args=sapo_config(output_dir, **overrides), **kwargs
    )


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def unmoved(before: dict[str, torch.Tensor], module: torch.nn.Module) -> list[str]:
    """Names of the parameters that are bit for bit what they were."""
    after = dict(module.named_parameters())
    assert after.keys() == before.keys()
    return [name for name, tensor in before.items() if torch.equal(tensor, after[name])]


def logged(trainer: SAPOTrainer, name: str) -> list[float]:
    """
    The values that were logged under a name, in order.

    Raises:
        KeyError: if nothing was, so that no test is about the values of an empty list. Absence has a function of its
            own, [`never_logged`].
    """
    values = [entry[name] for entry in trainer.state.log_history if name in entry]
    if not values:
        raise KeyError(f"{name!r} was never logged.")
    return values


def never_logged(trainer: SAPOTrainer, name: str) -> bool:
    return not any(name in entry for entry in trainer.state.log_history)


def advantages_of_tokens(
    token_rewards: torch.Tensor, values: torch.Tensor, segments: Segments, batch: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of `estimate_advantages`: the same for every critic, as they follow from the tokens alone."""
    drawn = torch.sin(batch["completion_ids"].double() * 12.9898).float()
    return segments.expand(segments.mean(drawn)) * segments.mask, segments.mask.float()


class Recorder(RolloutCallback):
    """Keeps every rollout, and which weights produced it."""

    def __init__(self):
        self.rollouts: list[SegmentedRollout] = []
        self.steps: list[int] = []

    def on_rollout(self, args, state, control, rollout, metrics):
        self.rollouts.append(copy.copy(rollout))
        self.steps.append(state.global_step)


class WeightRecorder(TrainerCallback):
    """Keeps the weights of some modules after every optimizer step."""

    def __init__(self, *modules: torch.nn.Module):
        self.modules = modules
        self.states: list[list[dict[str, torch.Tensor]]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.states.append([state_of(module) for module in self.modules])


def fixed_rollout(completions: Callable[[list, SAPOTrainer], list[list[int]]], **extra: Any):
    """
    A `rollout_func` that generates nothing: prompts through the chat template, completions from a function of the
    prompts. `extra` fields are functions of (prompts, completions).
    """

    def rollout(prompts: list, trainer: SAPOTrainer) -> dict[str, Any]:
        encoded = trainer.processing_class.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        completion_ids = completions(prompts, trainer)
        return {
            "prompt_ids": [list(ids) for ids in encoded["input_ids"]],
            "completion_ids": completion_ids,
            "logprobs": None,
            **{name: make(prompts, completion_ids) for name, make in extra.items()},
        }

    return rollout


def random_completions(seed: int = 0, min_length: int = 1, max_length: int = 8):
    """Completions of unequal lengths that depend on the position in the rollout batch and `seed` alone."""

    def completions(prompts: list, trainer: SAPOTrainer) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for _ in prompts:
            length = int(torch.randint(min_length, max_length + 1, (), generator=generator))
            # Neither special tokens nor ids beyond the bytes.
            rows.append(torch.randint(20, 250, (length,), generator=generator).tolist())
        return rows

    return completions


def script_generation(trainer: GRPOTrainer, turns: list[list[str]]) -> list[list[list[int]]]:
    """Let the policy say these texts, turn by turn, instead of its samples. Returns their token ids."""
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    ids = [[tokenizer.encode(text) for text in texts] for texts in turns]
    remaining = iter(ids)

    def generate(input_ids, **kwargs):
        rows = next(remaining)
        assert len(rows) == len(input_ids)
        length = max(map(len, rows))
        padded = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    trainer.model.generate = generate
    return ids
