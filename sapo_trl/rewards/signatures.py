"""Checks that reward functions can be called with a data set's columns, before a model is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from trl.trainer.utils import get_callable_name


TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments that TRL passes to each reward function, beside the columns of the data set."""

_NOT_PASSED = ("prompt", "completion", "completion_ids")


def check_reward_arguments(reward_funcs: Any, columns: Collection[str], name: str) -> None:
    """
    Check that each reward function takes the arguments that TRL passes, and gets the arguments that it needs.

    Args:
        reward_funcs (`RewardFunc` or `list[RewardFunc]`): functions; reward models and their names are not checked.
        columns (`Collection[str]`): columns of the data set.
        name (`str`): name of the data set in the error.

    Raises:
        ValueError: if a function needs an argument that is not passed, or does not take one that is.
    """
    passed = {*TRL_ARGUMENTS, *(set(columns) - set(_NOT_PASSED))}
    for function in reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]:
        if callable(function) and not isinstance(function, nn.Module):
            _check(function, passed, columns, name)


def _check(function: Callable, passed: set[str], columns: Collection[str], name: str) -> None:
    try:
        # Not the signature of a decorated function: its decorator may supply arguments.
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in by_name if p.default is p.empty and p.name not in passed]
    title = f"Reward function `{get_callable_name(function)}`"
    if missing:
        raise ValueError(
            f"{title} needs {_names(missing)}, but `{name}` has only the columns {_names(sorted(columns))}: add the "
            f"missing columns to the data, or give the arguments a default. TRL also passes {_names(TRL_ARGUMENTS)}."
        )
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        unknown = sorted(passed - {p.name for p in by_name})
        if unknown:
            raise ValueError(
                f"{title} does not take {_names(unknown)}, which it is called with: add `**kwargs` to its arguments."
            )


def _names(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
