"""Checks of a user's `rollout_func`: of its output, and whether it can sample ahead."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from ..config import SAPOConfig
from .checks import check_token_ids


def check_rollouts_ahead(args: SAPOConfig, others: Mapping[str, Any]) -> None:
    """
    Check that a run can sample rollouts ahead, if it shall.

    Args:
        args ([`SAPOConfig`]): settings of the run.
        others (`Mapping[str, Any]`): TRL's arguments.

    Raises:
        ValueError: for a sampler that cannot, or responses of several turns.
    """
    if args.rollouts_ahead == 0:
        return
    setting = f"`rollouts_ahead={args.rollouts_ahead}`"
    if args.use_vllm and args.vllm_mode == "server":
        raise ValueError(
            f'{setting} cannot be combined with `vllm_mode="server"`: TRL asks its server inside of the step, and '
            "sends weights over NCCL in the same call. Pass a `VLLMServerRollout` as `rollout_func` instead of "
            "`use_vllm=True`, or set `rollouts_ahead=0`."
        )
    if args.use_vllm:
        raise ValueError(
            f"{setting} cannot be combined with `vllm_mode={args.vllm_mode!r}`: that engine has the trainer's "
            "device and process, so it cannot sample while the policy is updated. Pass a `VLLMServerRollout` as "
            "`rollout_func` instead of `use_vllm=True`, or set `rollouts_ahead=0`."
        )
    for name in ("tools", "environment_factory"):
        if others.get(name):
            raise ValueError(
                f"{setting} cannot be combined with `{name}`: a response of several turns waits for answers between "
                "its turns, which the trainer gives, and the trainer is busy with the update. Set `rollouts_ahead=0`."
            )
    if args.critic in ("monte_carlo", "tree"):
        raise ValueError(
            f"{setting} cannot be combined with `critic={args.critic!r}`: its continuations must come from the policy "
            "that a rollout is scored with, and the server has begun the next rollout by then. Set `rollouts_ahead=0`."
        )
    sampler = others.get("rollout_func")
    if not callable(getattr(sampler, "request", None)):
        found = (
            "no `rollout_func`" if sampler is None else f"`rollout_func={sampler!r}`, which has no method `request`"
        )
        raise ValueError(
            f"{setting} needs a sampler beside the trainer, got {found}: pass a `VLLMServerRollout` as "
            "`rollout_func`, or set `rollouts_ahead=0`."
        )


def check_rollout(output: Mapping[str, Any], num_prompts: int, vocab_size: int) -> None:
    """
    Check the output of a `rollout_func`. TRL reports missing fields itself.

    Args:
        output (`Mapping[str, Any]`): `prompt_ids`, `completion_ids`, `logprobs` and perhaps `env_mask`.
        num_prompts (`int`): prompts that it was given.
        vocab_size (`int`): of the policy.

    Raises:
        TypeError: for an output that is no dictionary, and fields that are no lists of rows of integers.
        ValueError: for fields with another number of rows, an empty prompt or completion, a token that the policy does
            not know, or log-probabilities or a mask that do not fit the completion.
    """
    if not isinstance(output, Mapping):
        raise TypeError(
            "`rollout_func` must return a dictionary with `prompt_ids`, `completion_ids` and `logprobs`, got a "
            f"{type(output).__name__}."
        )
    for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask"):
        if not isinstance(output.get(name), list | tuple | None):
            raise TypeError(
                f"`rollout_func` must return a list with one row for each prompt as `{name}`, got a "
                f"{type(output[name]).__name__}."
            )
    for name in ("prompt_ids", "completion_ids"):
        rows = output.get(name)
        if rows is None:
            continue
        if len(rows) != num_prompts:
            raise ValueError(f"`rollout_func` returned {len(rows)} rows of `{name}` for {num_prompts} prompts.")
        for row, ids in enumerate(rows):
            if len(ids) == 0:
                raise ValueError(
                    f"`rollout_func` returned an empty list in row {row} of `{name}`: it needs at least one token, "
                    "such as the end-of-sequence token."
                )
            what = f"Row {row} of `{name}` from `rollout_func`"
            try:
                numbers = [operator.index(token) for token in ids]
            except TypeError as error:
                raise TypeError(f"{what} must be a list of token ids, got {repr(ids)[:60]}.") from error
            check_token_ids(numbers, vocab_size, what)
    completions = output.get("completion_ids") or ()
    for name in ("logprobs", "env_mask"):
        for row, (values, ids) in enumerate(zip(output.get(name) or (), completions, strict=False)):
            if len(values) != len(ids):
                raise ValueError(
                    f"`rollout_func` returned {len(values)} values of `{name}` for the {len(ids)} tokens of "
                    f"completion {row}: it needs one for each."
                )
