"""Calls users' reward functions. If a function fails for one completion, the others keep their rewards."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable


logger = logging.getLogger(__name__)

# After so many timeouts in a row, the remaining completions are not tried.
MAX_TIMEOUTS_IN_A_ROW = 3
# A working event loop answers within so many seconds.
LOOP_ANSWERS_WITHIN = 1.0
# Seconds between two checks whether a loop is still alive.
LOOP_CHECKED_EVERY = 0.1


def checked_rewards(reward_funcs: Any, timeout: float | None = None) -> Any:
    """[`checked_reward`] for everything that TRL accepts as `reward_funcs`. Reward models and ids pass unchanged."""
    if isinstance(reward_funcs, list | tuple):
        return [checked_rewards(reward_func, timeout) for reward_func in reward_funcs]
    if reward_funcs is None or isinstance(reward_funcs, str | nn.Module):
        return reward_funcs
    if not callable(reward_funcs):
        raise TypeError(f"`reward_funcs` must be callables, models or model ids, got {type(reward_funcs).__name__}.")
    return checked_reward(reward_funcs, timeout)


def checked_reward(reward_func: Callable, timeout: float | None = None) -> Callable:
    """
    Wrap a reward function so that its failures are logged and do not end the run.

    A call that raises, calls `sys.exit`, or takes longer than `timeout`, is repeated completion by completion. If it
    fails again for a completion, or returns NaN, the completion has no reward. Its reward is then `None`, which tells
    TRL that the function does not apply. Three things are errors: a failure for every completion, a wrong number of
    rewards, and an infinite reward.

    Asynchronous functions share a separate event loop. If a function blocks or ends this loop, the other functions
    continue with a new loop. Completions are repeated all at once. A completion that then runs out of time is repeated
    alone.

    Args:
        reward_func (`Callable`): synchronous or asynchronous TRL reward function.
        timeout (`float`, *optional*):
            longest time until a call has returned all rewards, in seconds; the work of a generator counts. With a
            timeout, synchronous functions run in a thread. A thread that does not return is abandoned.

    Returns:
        `Callable`:
            the wrapped function, of the same kind and name. It logs the share of failed completions as
            `rewards/<name>/failed`, if there are any.
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

        async def call(kwargs: dict[str, Any], on_a_loop: Callable = _on_the_loop) -> list[float | None]:
            async def score() -> list[float | None]:
                try:
                    return _checked(await reward_func(**kwargs), name, kwargs["completions"])
                except (SystemExit, KeyboardInterrupt) as error:  # asyncio would raise them in the caller, too
                    raise RuntimeError(_exited(error)) from error

            return await on_a_loop(score(), timeout)

        async def wrapper(**kwargs):
            try:
                return finish(await call(kwargs), {}, kwargs)
            except Exception as error:
                rows = _one_by_one(kwargs)
                if _is_final(error, rows):
                    raise
                outcomes: list[Any] = [error] * len(rows)
                if not isinstance(error, LoopLostError):
                    outcomes = await asyncio.gather(*map(call, rows), return_exceptions=True)
                tried: list[Any] = []
                for index, row in enumerate(rows):
                    # Another completion may have been in the way.
                    if isinstance(outcomes[index], LoopLostError | TimeoutError):
                        if not _is_given_up(tried):
                            tried += await asyncio.gather(call(row, _alone), return_exceptions=True)
                        outcomes[index] = tried[-1]
                return finish(*_separated(outcomes), kwargs)

    else:

        def score(**kwargs) -> list[float | None]:
            return _checked(reward_func(**kwargs), name, kwargs["completions"])

        def call(**kwargs) -> list[float | None]:
            try:
                return score(**kwargs) if timeout is None else _within(timeout, score, kwargs)
            except SystemExit as error:
                raise RuntimeError(_exited(error)) from error

        def wrapper(**kwargs):
            try:
                return finish(call(**kwargs), {}, kwargs)
            except Exception as error:
                rows = _one_by_one(kwargs)
                if _is_final(error, rows):
                    raise
                outcomes: list[Any] = []
                for row in rows:
                    if _is_given_up(outcomes):
                        outcomes.append(outcomes[-1])
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
    """A mistake in the function itself. A repetition would not help."""


def _checked(rewards: Any, name: str, completions: list) -> list[float | None]:
    """The rewards as a list. Raises unless there is one finite reward (or `None`) for each completion."""
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
            "rewards must be finite. Return `None` if the function does not apply."
        )
    return rewards


def _is_final(error: Exception, rows: list[dict[str, Any]]) -> bool:
    return isinstance(error, _WrongRewards) or len(rows) < 2


def _is_given_up(outcomes: list[Any]) -> bool:
    """Whether the last calls all ran out of time."""
    last = outcomes[-MAX_TIMEOUTS_IN_A_ROW:]
    return len(last) == MAX_TIMEOUTS_IN_A_ROW and all(isinstance(outcome, TimeoutError) for outcome in last)


def _exited(error: BaseException) -> str:
    return f"it called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"it raised {error!r}"


def _one_by_one(kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of separate calls, one for each completion."""
    number = len(kwargs["completions"])
    is_column = {name: isinstance(value, list) and len(value) == number for name, value in kwargs.items()}
    return [
        {name: [value[row]] if is_column[name] else value for name, value in kwargs.items()} for row in range(number)
    ]


def _separated(outcomes: list[Any]) -> tuple[list[float | None], dict[int, BaseException]]:
    """Rewards, and failures by position, from separate calls for the completions."""
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

    thread = threading.Thread(target=run, daemon=True)  # nothing waits for a daemon, not even the interpreter's end
    thread.start()
    thread.join(timeout)
    if "error" in outcome:
        raise outcome["error"]
    if "result" not in outcome:
        raise TimeoutError(_late(timeout))
    return outcome["result"]


def _late(timeout: float) -> str:
    return f"it did not return within {timeout:g} s"


class CallTimeoutError(TimeoutError):
    """Our limit was exceeded. A function's own `TimeoutError` has another type."""


class LoopLostError(Exception):
    """An event loop ended during a call, because of this call or of another call."""


class LoopBlockedError(LoopLostError, TimeoutError):
    """An event loop does not answer any more."""


class _Loop:
    """An event loop in a separate thread. It is used until a coroutine blocks or ends it."""

    def __init__(self):
        self.is_lost = False
        started: concurrent.futures.Future = concurrent.futures.Future()
        threading.Thread(target=self._run, args=[started], daemon=True).start()  # as for `_within`
        self._loop, self._end = started.result()

    async def run(self, coroutine: Coroutine, timeout: float | None) -> Any:
        """The coroutine's result. Raises [`CallTimeoutError`] after the timeout; the coroutine may go on running."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        result = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))
        while time.monotonic() < deadline:
            was_lost = self.is_lost
            await asyncio.wait([result], timeout=min(deadline - time.monotonic(), LOOP_CHECKED_EVERY))
            if result.cancelled():
                raise LoopLostError("it was cancelled, as by a task that stops its event loop or calls sys.exit")
            if result.done():
                return result.result()
            if was_lost:  # otherwise a call that began while the loop ended would never return
                raise LoopLostError("its event loop has ended")
        result.cancel()
        raise CallTimeoutError(_late(timeout))

    async def answers(self) -> bool:
        """Whether the loop is free. If a coroutine blocks it, the loop accepts no more work."""
        try:
            await self.run(asyncio.sleep(0), LOOP_ANSWERS_WITHIN)
        except (CallTimeoutError, LoopLostError):
            self.end()
        return not self.is_lost

    def end(self) -> None:
        """Accept no more work, and end the loop as soon as nothing blocks it."""
        self.is_lost = True
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._end.set)

    def _run(self, started: concurrent.futures.Future) -> None:
        async def until_the_end() -> None:
            end = asyncio.Event()
            started.set_result((asyncio.get_running_loop(), end))
            await end.wait()

        try:
            asyncio.run(until_the_end())
        # From a task that a coroutine started, or because a coroutine stopped the loop. All other tasks are cancelled.
        except (SystemExit, KeyboardInterrupt, RuntimeError):
            pass
        finally:
            self.is_lost = True


_loop: _Loop | None = None


async def _on_the_loop(coroutine: Coroutine, timeout: float | None) -> Any:
    """The result of a coroutine on the reward functions' loop, or on a new loop if their loop is lost."""
    global _loop
    if _loop is None or _loop.is_lost:
        _loop = _Loop()
    loop = _loop
    try:
        return await loop.run(coroutine, timeout)
    except CallTimeoutError as error:
        if await loop.answers():
            raise
        raise LoopBlockedError(f"{error}, and blocked its event loop") from error


async def _alone(coroutine: Coroutine, timeout: float | None) -> Any:
    """The result of a coroutine on a loop without any other work."""
    loop = _Loop()
    try:
        return await loop.run(coroutine, timeout)
    finally:
        loop.end()
