"""Accuracy of a model on problems it has not seen, with its uncertainty."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from ..data import geometry_prompt
from ..rewards import accuracy_reward
from ..statistics import wilson_interval


@dataclass(frozen=True)
class Evaluation:
    """Completions of a set of problems, and whether each was right."""

    completions: list[str]
    correct: list[bool]

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy."""
        return wilson_interval(sum(self.correct), len(self.correct))


def encode_prompts(processor: ProcessorMixin, problems: Dataset | list[dict]) -> dict[str, torch.Tensor]:
    """
    Encode the prompts of rows of (`images`, `problem`, `answer`), as TRL's trainers do for a rollout.

    Returns:
        `dict[str, torch.Tensor]`: Inputs of the model's forward, left-padded; for Qwen2.5-VL `input_ids`,
        `attention_mask` and `mm_token_type_ids` of shape `(B, T)`, `pixel_values` and `image_grid_thw`.
    """
    rows = (geometry_prompt(row) for row in problems)
    return processor.apply_chat_template(
        [prepare_multimodal_messages(row["prompt"], row["images"]) for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    problems: Dataset,
    *,
    temperature: float = 1.0,
    batch_size: int = 256,
    max_new_tokens: int = 64,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """
    Let a model solve problems, and score its completions with the training's reward.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Image-text-to-text model.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        problems ([`~datasets.Dataset`]):
            Columns `images`, `problem` and `answer`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; `0.0` decodes greedily.
        batch_size (`int`, *optional*, defaults to `256`):
            Problems solved at once.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest completion.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling. The caller's random state is left as it was.
        on_progress (`Callable[[int], None]`, *optional*):
            Called after every batch with the number of problems done so far.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be positive, or 0 for greedy decoding.")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    tokenizer = processor.tokenizer
    generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    was_training = model.training
    model.eval()
    completions: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for rows in problems.iter(batch_size):
            batch = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
            inputs = encode_prompts(processor, batch).to(model.device)
            sequences = model.generate(**inputs, generation_config=generation_config)
            tokens = sequences[:, inputs["input_ids"].shape[1] :]
            completions += tokenizer.batch_decode(tokens, skip_special_tokens=True)
            if on_progress is not None:
                on_progress(len(completions))
    model.train(was_training)
    rewards = accuracy_reward(completions=completions, answer=problems["answer"])
    return Evaluation(completions, [reward == 1.0 for reward in rewards])
