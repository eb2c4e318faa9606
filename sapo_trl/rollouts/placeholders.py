"""
Responses in which the policy writes a placeholder: the token that stands for a piece of an image in a prompt.

No image belongs to it there, and a model whose placeholders and features differ in number refuses to run. Such a
response is over with its first placeholder, as if it had been cut off at the length limit. The token stays, as the
last one: it was sampled, so that it has a log-probability and the policy learns about it like about any other.
Nothing is predicted from it, so that the model can be given another token in its place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch


# Only of what prompts can hold here. Those of videos and sounds are tokens like any other: no features, no count.
_NAMES = ("image_token_id", "image_token_index")


def placeholder_ids(config: Any) -> frozenset[int]:
    """The placeholders of a model, from its [`~transformers.PreTrainedConfig`]; none for a text model."""
    ids = (getattr(config, name, None) for name in _NAMES)
    return frozenset(token for token in ids if isinstance(token, int))


def length_until_placeholder(
    completion: Sequence[int], placeholders: Collection[int], sampled: Sequence[int] | None = None
) -> int:
    """
    Number of tokens up to and including the first placeholder that the policy wrote; all of them without any.

    Args:
        completion (`Sequence[int]`): token ids of a response.
        placeholders (`Collection[int]`): of [`placeholder_ids`].
        sampled (`Sequence[int]`, *optional*): 1 on each of its tokens that the policy wrote. By default that is all.
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
    Responses of one turn up to their first placeholder, with the sampler's log-probabilities.

    Args:
        completion_ids (`list[list[int]]`): token ids of each response.
        logps (`list[list[float]]`, *optional*): of each of their tokens.
        placeholders (`Collection[int]`): of [`placeholder_ids`].
        may_go_on (`bool`): whether a tool may answer. Its answer would come behind the placeholder and be predicted
            from it: then the placeholder goes too, unless it is all there is, which calls no tool.
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
    What a `rollout_func` returned, with its responses cut.

    Args:
        output (`dict`): `completion_ids`, `logprobs` and perhaps `env_mask`, one list for each response, and more.
        placeholders (`Collection[int]`): of [`placeholder_ids`].

    Returns:
        `dict`: the same with shorter lists. Fields of other names are left as they are.
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
    Where responses were cut.

    Args:
        completion_ids (`torch.Tensor`): int64 `(B, T)`, padded on the right.
        placeholders (`Collection[int]`): of [`placeholder_ids`].
        pad_token_id (`int`): what it is padded with.

    Returns:
        `torch.Tensor`: bool `(B, T)`, the placeholders that are the last token of a response.
    """
    position = torch.arange(completion_ids.size(1), device=completion_ids.device)
    last = torch.where(completion_ids != pad_token_id, position, 0).amax(dim=1, keepdim=True)
    found = torch.zeros_like(completion_ids, dtype=torch.bool)
    for placeholder in placeholders:  # one or two, and no tensor of them that would have to be copied to the device
        found |= completion_ids == placeholder
    return found & (position == last)


def hide_placeholders(
    model_inputs: dict[str, Any], completion_length: int, placeholders: Collection[int], pad_token_id: int
) -> dict[str, Any]:
    """
    Inputs of a model with padding in the place of the placeholders that end responses.

    Args:
        model_inputs (`dict`): `input_ids` and perhaps `mm_token_type_ids`, `(B, P + T)`, and more.
        completion_length (`int`): `T`.
        placeholders (`Collection[int]`): of [`placeholder_ids`].
        pad_token_id (`int`): the token to put there.
    """
    ids = model_inputs["input_ids"]
    hidden = final_placeholders(ids[:, -completion_length:], placeholders, pad_token_id)
    hidden = torch.nn.functional.pad(hidden, (ids.size(1) - completion_length, 0))
    changed = {**model_inputs, "input_ids": ids.masked_fill(hidden, pad_token_id)}
    if "mm_token_type_ids" in changed:
        changed["mm_token_type_ids"] = changed["mm_token_type_ids"].masked_fill(hidden, 0)
    return changed
