"""From rows of the task's data sets to prompts, as trainers and models take them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from ...data import geometry_prompt


def task_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """One row of [`make_problems`] as a row with `prompt` and `answer`, and `images` if it has some."""
    if "images" in row:
        return geometry_prompt(row)
    return {"prompt": [{"role": "user", "content": row["problem"]}], "answer": row["answer"]}


def to_task_prompts(problems: Dataset) -> Dataset:
    """A whole data set of [`make_problems`], as trainers take it."""
    return problems.map(task_prompt, remove_columns=["problem"])


def encode_prompts(
    processor: ProcessorMixin | PreTrainedTokenizerBase, rows: Iterable[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """
    Encode the prompts of rows of [`make_problems`], as TRL's trainers do for a rollout.

    Returns:
        `dict[str, torch.Tensor]`: Inputs of the model's forward, left-padded.
    """
    prompts = [task_prompt(row) for row in rows]
    messages = [
        prepare_multimodal_messages(row["prompt"], row["images"]) if "images" in row else row["prompt"]
        for row in prompts
    ]
    padding = {"padding": True, "padding_side": "left"}
    if isinstance(processor, ProcessorMixin):
        padding = {"processor_kwargs": padding}
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **padding
    )
