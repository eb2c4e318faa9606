"""Checks of users' data, models and functions. Each error names the field, its value and the remedy."""

from __future__ import annotations

import logging
from collections.abc import Collection
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import prepare_multimodal_messages

from ..data.columns import row_images
from ..segments import Segments


logger = logging.getLogger(__name__)

# Rows of a data set whose images are counted before training: enough to catch a wrong template or processor.
NUM_ROWS_CHECKED = 8


def check_prompt_column(dataset: Dataset | IterableDataset | None, name: str) -> None:
    """
    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*): data set to check.
        name (`str`): what to call it in the error.

    Raises:
        ValueError: if it has no column `prompt` or no rows.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        return
    columns = dataset.column_names
    if columns is None:  # a stream does not know its columns before its first row
        columns = list(next(iter(dataset), {}))
    if "prompt" not in columns:
        hint = ""
        if {"problem", "answer"} <= set(columns):
            hint = " Rows of `problem` (and `images`) become prompts with the functions in `sapo_trl.data`."
        raise ValueError(f"`{name}` needs a column `prompt`; it has {sorted(columns)}.{hint}")
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"`{name}` has no rows.")


def datasets_of(eval_dataset: Any) -> dict[str, Any]:
    """The data sets behind TRL's `eval_dataset` (none, one, or a dictionary), by what to call them in an error."""
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval_dataset": eval_dataset}


def check_size(dataset: Dataset | IterableDataset | None, generation_batch_size: int, num_generations: int) -> None:
    """
    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*): training data.
        generation_batch_size (`int`): responses of a rollout, over all processes.
        num_generations (`int`): responses for each prompt.

    Raises:
        ValueError: if the data set does not fill one rollout: TRL would make no training step at all.
    """
    needed = generation_batch_size // num_generations
    if isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} rows, but one rollout takes {needed} prompts "
            f"(generation_batch_size={generation_batch_size} / num_generations={num_generations}): lower "
            "`per_device_train_batch_size`, `gradient_accumulation_steps` or `num_mini_batches`, or bring more rows."
        )


def check_finite_rewards(rewards_per_func: torch.Tensor, names: list[str]) -> None:
    """
    Check the rewards that [`~sapo_trl.rewards.calls.checked_reward`] does not see: reward models' and environments'.
    NaN means unscored.

    Args:
        rewards_per_func (`torch.Tensor`): float tensor of shape `(B, F)`.
        names (`list[str]`): of the `F` reward functions.

    Raises:
        ValueError: if one is infinite.
    """
    infinite = rewards_per_func.isinf()
    if infinite.any():
        row, column = infinite.nonzero()[0].tolist()
        raise ValueError(
            f"Reward function `{names[column]}` returned {float(rewards_per_func[row, column])} for completion {row} "
            f"of {len(rewards_per_func)}; rewards must be finite."
        )


def check_token_ids(ids: Collection[int], vocab_size: int, what: str) -> None:
    """
    Args:
        ids (`Collection[int]`): token ids.
        vocab_size (`int`): of the policy.
        what (`str`): what to call them in the error.

    Raises:
        ValueError: if the policy has no embedding of one of them.
    """
    least, largest = min(ids, default=0), max(ids, default=-1)
    if least < 0:
        raise ValueError(f"{what} has the token id {least}; token ids begin at 0.")
    if largest >= vocab_size:
        raise ValueError(
            f"{what} has the token id {largest}, but the policy has embeddings of {vocab_size} tokens. If tokens were "
            "added to the tokenizer, call `model.resize_token_embeddings(len(tokenizer))` before training; else use "
            "the model's own tokenizer."
        )


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise a `ValueError` if the policy has no embedding of the token that ends a response or pads it."""
    vocab_size = model.config.get_text_config().vocab_size
    for name in ("eos_token", "pad_token"):
        index = getattr(tokenizer, f"{name}_id")
        if index is not None:
            check_token_ids([index], vocab_size, f"The tokenizer's `{name}` {getattr(tokenizer, name)!r}")


def check_adapter_name(model: Any, beta: float) -> None:
    """
    Args:
        model: the policy, or its name.
        beta (`float`): coefficient of the KL penalty.

    Raises:
        ValueError: if the policy is compared with a reference, and its active adapter is not named "default". TRL
            would then copy the wrong adapter to the reference.
    """
    if beta == 0.0 or not isinstance(model, PeftModel):
        return
    active = [model.active_adapters] if isinstance(model.active_adapters, str) else list(model.active_adapters)
    if active != ["default"]:
        raise ValueError(
            f"The policy's active adapter is {', '.join(map(repr, active))}, and with beta={beta} TRL copies the "
            'adapter "default" to the reference: load the adapter with `adapter_name="default"`, as `get_peft_model` '
            "and `PeftModel.from_pretrained` do unless told otherwise, or set `beta=0`."
        )


def check_finite_weights(module: nn.Module, what: str) -> None:
    """
    Args:
        module (`torch.nn.Module`): a model.
        what (`str`): what to call it in the error.

    Raises:
        ValueError: if one of this process's weights is NaN or infinite.
    """
    named = [(n, p.detach()) for n, p in module.named_parameters() if p.is_floating_point() and p.numel() > 0]
    named = [(name, p.to_local() if isinstance(p, DTensor) else p) for name, p in named if not p.is_meta]
    # A sum is finite only if all its terms are, and takes no memory. It is asked for once.
    if not named or bool(torch.stack([p.sum(dtype=torch.float32).isfinite().cpu() for _, p in named]).all()):
        return
    for name, parameter in named:
        if not parameter.isfinite().all():
            count = int((~parameter.isfinite()).sum())
            raise ValueError(
                f"{what} has {count} of {parameter.numel()} weights that are NaN or infinite in {name!r} before "
                "training. Load it from an undamaged file, or in another dtype (float16 overflows above 65504)."
            )


def check_segments(segments: Any, mask: torch.Tensor) -> None:
    """
    Args:
        segments (`Any`): a segmenter's result.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)` that it was to partition.

    Raises:
        TypeError: if it is no [`Segments`].
        ValueError: if it does not cover the mask exactly, or its ids do not count up from 0 in every row.
    """
    if not isinstance(segments, Segments):
        raise TypeError(f"The segmenter must return `Segments`, got {type(segments).__name__}.")
    if segments.ids.shape != mask.shape:
        raise ValueError(
            f"The segmenter must return ids of the mask's shape {tuple(mask.shape)}, got {tuple(segments.ids.shape)}."
        )
    wrong = segments.mask != mask
    if wrong.any():
        row = int(wrong.any(dim=1).nonzero()[0])
        missing = int((mask & ~segments.mask)[row].sum())
        extra = int((segments.mask & ~mask)[row].sum())
        raise ValueError(
            f"The segmenter's result does not cover the mask: in row {row} of {mask.size(0)}, {missing} completion "
            f"tokens belong to no segment and {extra} other positions belong to one."
        )
    # With ids that count up from 0 one by one, each row has as many first tokens as its largest id + 1, and a running
    # count of them reproduces the ids.
    recounted = torch.cumsum(segments.is_first, dim=1) - 1
    if not torch.equal(recounted.masked_fill(~mask, -1), segments.ids):
        row = int((recounted.masked_fill(~mask, -1) != segments.ids).any(dim=1).nonzero()[0])
        raise ValueError(
            f"The segmenter's ids must count up from 0 without gaps from left to right; row {row} has "
            f"{segments.ids[row][mask[row]].tolist()}."
        )


def check_images(
    dataset: Dataset | IterableDataset | None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    model: PreTrainedModel,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> None:
    """
    Compare, for the first rows of a data set, the image tokens of the prompt with the features its images will give.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*): data set to check.
        processing_class: the trainer's.
        model ([`~transformers.PreTrainedModel`]): the policy.
        chat_template_kwargs (`dict`, *optional*): passed to the chat template.

    Raises:
        ValueError: if the numbers differ, or a row's images and image placeholders do not pair.
    """
    vision_config = getattr(model.config, "vision_config", None)
    merge_size = getattr(vision_config, "spatial_merge_size", None)
    if merge_size is None or not isinstance(dataset, Dataset | IterableDataset):
        return  # a text model, or one whose image tokens are not a function of `image_grid_thw`
    if not isinstance(processing_class, ProcessorMixin):
        if {"image", "images"} & set(next(iter(dataset), {})):
            raise ValueError(
                f"The data set has images, but `processing_class` is a {type(processing_class).__name__}, which reads "
                "only text: pass the model's processor."
            )
        return
    for index, row in enumerate(islice(dataset, NUM_ROWS_CHECKED)):
        prompt = row.get("prompt")
        if prompt is None or isinstance(prompt, str):
            continue  # an environment's, or text: TRL explains that images need conversational prompts
        images = row_images(row)
        try:
            encoded = processing_class.apply_chat_template(
                [prepare_multimodal_messages(prompt, images=images)],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **(chat_template_kwargs or {}),
            )
        except (ValueError, StopIteration) as error:  # the latter from older processors that run out of images
            reason = str(error) or "the messages have more image placeholders than images"
            raise ValueError(f"Row {index} of the data set has {len(images)} image(s): {reason}") from error
        tokens = sum(ids.count(model.config.image_token_id) for ids in map(list, encoded["input_ids"]))
        grid = torch.as_tensor(encoded.get("image_grid_thw", torch.empty(0, 3, dtype=torch.long)))
        features = int(grid.prod(dim=-1).sum()) // merge_size**2
        if tokens != features:
            raise ValueError(
                f"Row {index} of the data set: the prompt has {tokens} image tokens (id "
                f"{model.config.image_token_id}), but its {len(images)} image(s) give {features} features (grids "
                f"{grid.tolist()}, merge size {merge_size}). Each image needs one placeholder in the messages, "
                "none written out in the text, and the processor must belong to the model."
            )


def check_sampler(difference: float, threshold: float | None) -> None:
    """
    Args:
        difference (`float`): mean absolute difference of the training model's and the sampler's log-probabilities.
        threshold (`float`, *optional*): the largest that is accepted; `None` accepts all.

    Raises:
        ValueError: if they differ by more: then the sampler answers other prompts, or with other weights.
    """
    if threshold is not None and difference > threshold:
        raise ValueError(
            f"In the first rollout the log-probabilities of the engine that sampled differ from the training model's "
            f"by {difference:.4f} on average, more than max_sampler_logp_difference={threshold}. Usual causes: the "
            "engine has other weights (a failed weight sync, another revision); it reads another prompt (image "
            "placeholders expanded twice, another chat template or padding side); its log-probabilities are taken "
            "before the temperature, or after top-p or top-k; another precision or attention kernel. Set "
            "max_sampler_logp_difference=None to go on all the same."
        )


def check_padding_side(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """Set left padding, without which prompts and image markers are silently misaligned."""
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if tokenizer.padding_side != "left":
        logger.warning(
            "The processing class pads on the %s; prompts must be padded on the left. Setting it to 'left'.",
            tokenizer.padding_side,
        )
        tokenizer.padding_side = "left"
