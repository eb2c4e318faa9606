"""
Responses in which the policy writes a placeholder: the token that stands for a piece of an image in a prompt.

In a response no image belongs to it, and a model refuses to run if its placeholders and features differ in number. So
the first placeholder ends a response, as if the response had been cut off at the length limit. The placeholder stays
as the last token. It was sampled: it has a log-probability, and the policy learns about it as about any other token.
No token is predicted from it, so the model can read another token instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch


# Prompts hold only images here. A video's or sound's placeholder is a token like any other: no features, no count.
_NAMES = ("image_token_id", "image_token_index")


def placeholder_ids(config: Any) -> frozenset[int]:
    """The placeholders of a model, from its [`~transformers.PreTrainedConfig`]; none for a text model."""
    ids = (getattr(config, name, None) for name in _NAMES)
    return frozenset(token for token in ids if isinstance(token, int))


def length_until_placeholder(
    completion: Sequence[int], placeholders: Collection[int], sampled: Sequence[int] | None = None
) -> int:
    """
    Number of tokens up to and including the first placeholder that the policy wrote; all tokens if it wrote none.

    Args:
        completion (`Sequence[int]`): token ids of a response.
        placeholders (`Collection[int]`): of [`placeholder_ids`].
        sampled (`Sequence[int]`, *optional*): 1 on each token that the policy wrote. By default it wrote all.
    """
    for position, token in enumerate(completion):
        if token in placeholders and (sampled is None or sampled[position]):
            return position + 1
    return len(completion)


def cut_turn(
    completion_ids: list[list[int]],
    logps: list[list[float]] | None,
    placeholders: Collection[int],
    may_go_on: bool,
) -> tuple[list[list[int]], list[list[float]] | None]:
    """
    Cut the responses of one turn behind their first placeholder, and the sampler's log-probabilities with them.

    Args:
        completion_ids (`list[list[int]]`): token ids of each response.
        logps (`list[list[float]]`, *optional*): log-probability of each of their tokens.
        placeholders (`Collection[int]`): of [`placeholder_ids`].
        may_go_on (`bool`): whether a tool may answer. The answer would be predicted from the placeholder, so the
            placeholder is cut off too. It stays if it is the only token: such a response calls no tool.
    """
    if not placeholders:
        return completion_ids, logps
    lengths = [length_until_placeholder(ids, placeholders) for ids in completion_ids]
    if may_go_on:
        lengths = [
            max(length - (ids[length - 1] in placeholders), 1)
            for ids, length in zip(completion_ids, lengths, strict=True)
        ]
    completion_ids, logps = (
        rows and [row[:length] for row, length in zip(rows, lengths, strict=True)] for rows in (completion_ids, logps)
    )
    return completion_ids, logps


def cut_rollout(output: dict[str, Any], placeholders: Collection[int]) -> dict[str, Any]:
    """
    Cut the responses that a `rollout_func` returned.

    Args:
        output (`dict`): `completion_ids`, `logprobs` and perhaps `env_mask`, one list for each response.
        placeholders (`Collection[int]`): of [`placeholder_ids`].

    Returns:
        `dict`: the same with shorter lists. Other fields are left as they are.
    """
    completions = output["completion_ids"]
    masks = output.get("env_mask") or [None] * len(completions)
    lengths = [length_until_placeholder(ids, placeholders, mask) for ids, mask in zip(completions, masks, strict=True)]
    cut = {
        name: [row[:length] for row, length in zip(output[name], lengths, strict=True)]
        for name in ("completion_ids", "logprobs", "env_mask")
        if output.get(name) is not None
    }
    return {**output, **cut}


def final_placeholders(completion_ids: torch.Tensor, placeholders: Collection[int], pad_token_id: int) -> torch.Tensor:
    """
    Find the placeholders that end responses.

    Args:
        completion_ids (`torch.Tensor`): int64 `(B, T)`, padded on the right.
        placeholders (`Collection[int]`): of [`placeholder_ids`].
        pad_token_id (`int`): the token that pads the responses.

    Returns:
        `torch.Tensor`: bool `(B, T)`, the placeholders that are the last token of a response.
    """
    position = torch.arange(completion_ids.size(1), device=completion_ids.device)
    last = torch.where(completion_ids != pad_token_id, position, 0).amax(dim=1, keepdim=True)
    found = torch.zeros_like(completion_ids, dtype=torch.bool)
    for placeholder in placeholders:  # one or two: a tensor of them would have to be copied to the device
        found |= completion_ids == placeholder
    return found & (position == last)


def hide_placeholders(
    model_inputs: dict[str, Any], completion_length: int, placeholders: Collection[int], pad_token_id: int
) -> dict[str, Any]:
    """
    Replace the placeholders that end responses by padding in a model's inputs.

    Args:
        model_inputs (`dict`): `input_ids` and perhaps `mm_token_type_ids`, `(B, P + T)`, and more.
        completion_length (`int`): `T`.
        placeholders (`Collection[int]`): of [`placeholder_ids`].
        pad_token_id (`int`): the token to replace them by.
    """
    ids = model_inputs["input_ids"]
    hidden = final_placeholders(ids[:, -completion_length:], placeholders, pad_token_id)
    hidden = torch.nn.functional.pad(hidden, (ids.size(1) - completion_length, 0))
    changed = {**model_inputs, "input_ids": ids.masked_fill(hidden, pad_token_id)}
    if "mm_token_type_ids" in changed:
        changed["mm_token_type_ids"] = changed["mm_token_type_ids"].masked_fill(hidden, 0)
    return changed
