"""Calls of users' reward functions: what fails for one completion costs no other its reward."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import threading
from collections.abc import Callable
from typing import Any

from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable


logger = logging.getLogger(__name__)

# So many completions in a row that run out of time, and the others are not tried any more.
MAX_TIMEOUTS_IN_A_ROW = 3


def checked_rewards(reward_funcs: Any, timeout: float | None = None) -> Any:
    """[`checked_reward`] for whatever TRL accepts as `reward_funcs`; reward models and their ids pass unchanged."""
    if isinstance(reward_funcs, list | tuple):
        return [checked_rewards(reward_func, timeout) for reward_func in reward_funcs]
    if reward_funcs is None or isinstance(reward_funcs, str | nn.Module):
        return reward_funcs
    if not callable(reward_funcs):
        raise TypeError(f"`reward_funcs` must be callables, models or model ids, got {type(reward_funcs).__name__}.")
    return checked_reward(reward_funcs, timeout)


def checked_reward(reward_func: Callable, timeout: float | None = None) -> Callable:
    """
    Wrap a reward function so that its failures are seen and survived.

    A call that raises, or takes longer than `timeout`, is repeated completion by completion. A completion for which it
    does so again, or returns NaN, has no reward: it becomes `None`, which tells TRL that the function does not apply.
    What is an error: failing for every completion, a wrong number of rewards, an infinite one.

    Args:
        reward_func (`Callable`): synchronous or asynchronous TRL reward function.
        timeout (`float`, *optional*):
            seconds that a call may take. With it synchronous functions run in a thread, which is left behind when it
            does not come back.

    Returns:
        `Callable`:
            the same, of the same kind and name. If completions fail it logs their share as `rewards/<name>/failed`.
    """
    name = get_callable_name(reward_func)

    def finish(rewards: list[float | None], failures: dict[int, BaseException], kwargs: dict) -> list[float | None]:
        for index, reward in enumerate(rewards):
            if reward is not None and math.isnan(reward):
                failures[index] = ValueError("it returned NaN")
        if not failures:
            return rewards
        number, first = len(rewards), next(iter(failures.values()))
        if len(failures) == number:
            raise RuntimeError(f"Reward function `{name}` failed for all {number} completions: {first!r}") from first
        logger.warning("Reward function `%s` failed for %d of %d completions: %r", name, len(failures), number, first)
        if "log_metric" in kwargs:
            kwargs["log_metric"](f"rewards/{name}/failed", len(failures) / number)
        return [None if index in failures else reward for index, reward in enumerate(rewards)]

    if is_async_callable(reward_func):

        async def call(**kwargs) -> list[float | None]:
            return _checked(await asyncio.wait_for(reward_func(**kwargs), timeout), name, kwargs["completions"])

        async def wrapper(**kwargs):
            try:
                return finish(await call(**kwargs), {}, kwargs)
            except Exception as error:
                rows = _one_by_one(kwargs)
                if _is_final(error, rows):
                    raise
                outcomes = await asyncio.gather(*(call(**row) for row in rows), return_exceptions=True)
                return finish(*_separated(outcomes), kwargs)

    else:

        def call(**kwargs) -> list[float | None]:
            rewards = reward_func(**kwargs) if timeout is None else _within(timeout, reward_func, kwargs)
            return _checked(rewards, name, kwargs["completions"])

        def wrapper(**kwargs):
            try:
                return finish(call(**kwargs), {}, kwargs)
            except Exception as error:
                rows = _one_by_one(kwargs)
                if _is_final(error, rows):
                    raise
                outcomes: list[Any] = []
                for row in rows:
                    last = outcomes[-MAX_TIMEOUTS_IN_A_ROW:]
                    if len(last) == MAX_TIMEOUTS_IN_A_ROW and all(isinstance(o, TimeoutError) for o in last):
                        outcomes.append(last[-1])
                        continue
                    try:
                        outcomes.append(call(**row))
                    except Exception as row_error:
                        outcomes.append(row_error)
                return finish(*_separated(outcomes), kwargs)

    functools.update_wrapper(wrapper, reward_func)
    wrapper.__name__ = name  # partials and instances have none, and TRL logs by this name
    return wrapper


class _WrongRewards(ValueError):
    """A mistake in the function itself, which no repetition mends."""


def _checked(rewards: Any, name: str, completions: list) -> list[float | None]:
    """Raise unless there is one reward for each completion, none of them infinite."""
    try:
        rewards = list(rewards)
        infinite = [reward is not None and math.isinf(reward) for reward in rewards]
    except TypeError as error:
        raise _WrongRewards(
            f"Reward function `{name}` must return a list with a number (or `None`) for each completion, got "
            f"{rewards!r}."
        ) from error
    if len(rewards) != len(completions):
        raise _WrongRewards(
            f"Reward function `{name}` returned {len(rewards)} rewards for {len(completions)} completions; it must "
            "return one for each."
        )
    if any(infinite):
        index = infinite.index(True)
        raise _WrongRewards(
            f"Reward function `{name}` returned {float(rewards[index])} for completion {index} of {len(completions)}; "
            "rewards must be finite. Return `None` where the function does not apply."
        )
    return rewards


def _is_final(error: Exception, rows: list[dict[str, Any]]) -> bool:
    return isinstance(error, _WrongRewards) or len(rows) < 2


def _one_by_one(kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of a call for each completion alone."""
    number = len(kwargs["completions"])
    is_column = {name: isinstance(value, list) and len(value) == number for name, value in kwargs.items()}
    return [
        {name: [value[row]] if is_column[name] else value for name, value in kwargs.items()} for row in range(number)
    ]


def _separated(outcomes: list[Any]) -> tuple[list[float | None], dict[int, BaseException]]:
    """Rewards, and what went wrong by position, of calls for one completion each."""
    failures = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)}
    wrong = next((failure for failure in failures.values() if isinstance(failure, _WrongRewards)), None)
    if wrong is not None:
        raise wrong
    return [None if index in failures else outcome[0] for index, outcome in enumerate(outcomes)], failures


def _within(timeout: float, function: Callable, kwargs: dict[str, Any]) -> Any:
    """Call a function in a thread, and leave it there if it takes too long."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = function(**kwargs)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)  # nobody waits for it, the interpreter's end included
    thread.start()
    thread.join(timeout)
    if "error" in outcome:
        raise outcome["error"]
    if "result" not in outcome:
        raise TimeoutError(f"it did not return within {timeout:g} s")
    return outcome["result"]
