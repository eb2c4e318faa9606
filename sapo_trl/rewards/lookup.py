"""Finds reward functions by their names in a run file."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .. import rewards


_OF_A_RESPONSE = frozenset({"completion", "prompt", "prompts", "problem", "answer", "solution", "image", "images"})
"""Parameters without a default that a reward function may have, but no function that makes one."""


def find_reward(name: str, settings: Mapping[str, Any] | None = None) -> Callable[..., list[float | None]]:
    """
    Find a reward function, and apply its settings.

    Args:
        name (`str`):
            A name from `sapo_trl.rewards`, or an import path such as `my_package.my_reward`. The path may also lead to
            a class, or to a function that returns a reward function, such as TRL's
            `trl.rewards.get_soft_overlong_punishment`.
        settings (`Mapping[str, Any]`, *optional*):
            Arguments by name.

    Returns:
        `Callable`: the reward function. Raises `ValueError` for an unknown name, an unknown setting, a missing
        setting or a function without `completions`, and `ModuleNotFoundError` if the module does not exist.
    """
    found = _find(name)
    settings = dict(settings or {})
    parameters = inspect.signature(found).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    makes_one = inspect.isclass(found) or not (takes_any or {"completions", "completion_ids"} & parameters.keys())
    unknown = [key for key in settings if key not in parameters]
    if unknown:
        raise ValueError(f"reward_settings: {name!r} takes no {unknown}; it takes {list(parameters)}.")
    if not makes_one:
        return functools.partial(found, **settings) if settings else found
    missing = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    missing = [key for key in missing if key not in settings]
    if not inspect.isclass(found) and _OF_A_RESPONSE & set(missing):
        raise ValueError(
            f"reward_funcs={name!r}: a reward function takes `completions`, a list, and each column as a list; this "
            f"one takes {list(parameters)}."
        )
    if missing:
        raise ValueError(f"reward_settings: {name!r} needs {missing}, such as {{{name}: {{{missing[0]}: …}}}}.")
    return found(**settings)


def _find(name: str) -> Callable:
    if name in rewards.__all__:
        return getattr(rewards, name)
    module_name, _, function_name = name.rpartition(".")
    if not module_name:
        raise ValueError(f"reward_funcs={name!r} is neither one of {rewards.__all__} nor an import path such as a.b.")
    if os.getcwd() not in sys.path:  # the path of a console script lacks the current folder
        sys.path.append(os.getcwd())
    module = importlib.import_module(module_name)
    if not hasattr(module, function_name):
        raise ValueError(f"reward_funcs={name!r}: the module {module_name!r} has no {function_name!r}.")
    return getattr(module, function_name)
