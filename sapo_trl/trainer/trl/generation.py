"""Between TRL's rollout and the backend that generates: prompts and images on the way in, responses on the way out."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from trl import GRPOTrainer, prepare_multimodal_messages
from trl.generation.vllm_generation import VLLMGeneration

from ...config import SAPOConfig
from ...data.columns import IMAGE_COLUMNS, row_images
from ...generation.model_settings import left_to_the_model, shaping_settings
from ...rollouts.placeholders import cut_rollout
from ..rollout_checks import check_rollout


logger = logging.getLogger(__name__)

_GENERATE = inspect.getsource(VLLMGeneration.generate)
# Whether TRL hands a colocated vLLM the trainer's own ids beside the images. A TRL that collapses the placeholders, or
# sends features to put in their place, needs no help. If a new version goes wrong, the comparison of log-probabilities
# in the first rollout tells.
TRL_EXPANDS_PLACEHOLDERS_TWICE = '{"prompt_token_ids": ids}' in _GENERATE and "collapse" not in _GENERATE.lower()


def prompts_of(inputs: list[dict[str, Any]]) -> list:
    """Prompts with their images in place, as TRL makes them from rows of the data set."""
    images = [row_images(row) for row in inputs]
    prompts = [copy.deepcopy(row["prompt"]) for row in inputs]
    if not any(images):
        return prompts
    return [prepare_multimodal_messages(prompt, images=row) for prompt, row in zip(prompts, images, strict=True)]


def with_image_lists(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a rollout, with an empty list for a prompt without image instead of the `None` of data sets."""
    if any(row.get(column, []) is None for row in inputs for column in IMAGE_COLUMNS):
        return [{**row, "images": row_images(row)} for row in inputs]
    return inputs


def for_vllm(
    prompt_ids: list[list[int]], images: list | None, image_token_id: int | None
) -> tuple[list[list[int]], list | None]:
    """
    Prompts and images as vLLM reads them.

    For a prompt without image transformers' processors want a list and vLLM wants `None`. And a colocated vLLM expands
    image placeholders itself: expanded placeholders would make prompts that differ from the training prompts
    (https://github.com/huggingface/trl/issues/6294).

    Args:
        prompt_ids (`list[list[int]]`): token ids of each prompt, placeholders expanded.
        images (`list`, *optional*): the images of each prompt.
        image_token_id (`int`, *optional*): the placeholder, of a vLLM that expands it.
    """
    if not images:
        return prompt_ids, images
    if image_token_id is not None and TRL_EXPANDS_PLACEHOLDERS_TWICE:
        prompt_ids = [collapsed(ids, image_token_id) for ids in prompt_ids]
    return prompt_ids, [row or None for row in images]


def collapsed(ids: list[int], token_id: int) -> list[int]:
    """Token ids with each run of one token reduced to a single one."""
    return [
        token for position, token in enumerate(ids) if token != token_id or ids[position - 1 : position] != [token]
    ]


@contextlib.contextmanager
def at_most(max_new_tokens: int, generator: VLLMGeneration | GenerationConfig) -> Iterator[None]:
    """Let a backend generate so many tokens at most."""
    name = "max_new_tokens" if isinstance(generator, GenerationConfig) else "max_completion_length"
    usual = getattr(generator, name)
    setattr(generator, name, max_new_tokens)
    try:
        yield
    finally:
        setattr(generator, name, usual)


def checked_rollout_func(sample: Callable, placeholder_ids: Collection[int], vocab_size: int) -> Callable:
    """A `rollout_func` whose output is checked, and whose responses end with an image placeholder."""

    def rollout(prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
        output = sample(prompts, trainer)
        check_rollout(output, len(prompts), vocab_size)
        complete = output.get("completion_ids") is not None
        return cut_rollout(output, placeholder_ids) if complete and placeholder_ids else output

    return rollout


def warn_of_sampling_settings(
    policy: PreTrainedModel, generation_config: GenerationConfig, settings: dict[str, Any], args: SAPOConfig
) -> None:
    """
    Warn of settings that change the distribution of samples: the model's, which training ignores, and the run's own.

    Args:
        policy ([`~transformers.PreTrainedModel`]): whose `generation_config` is looked at.
        generation_config ([`~transformers.GenerationConfig`]): TRL's.
        settings (`dict[str, Any]`): TRL's arguments for it.
        args ([`SAPOConfig`]): settings of the run.
    """
    ignored = left_to_the_model(policy, generation_config)
    if ignored:
        logger.warning(
            "The model's `generation_config` sets %s. Training ignores it, because responses would come from "
            "another distribution than the policy that is trained. To sample with it all the same, set "
            "`generation_kwargs`.",
            _named(ignored),
        )
    settings = dict(settings)
    if "suppress_tokens" not in (args.generation_kwargs or {}):
        settings.pop("suppress_tokens", None)  # TRL's, of the image placeholder
    if shaping := shaping_settings(settings, args.temperature):
        logger.warning(
            "Responses are sampled with %s, as `args` says: from another distribution than the policy's, whose "
            "log-probabilities the loss takes. The gradient is biased by the difference.",
            _named(shaping),
        )


def _named(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in settings.items())
