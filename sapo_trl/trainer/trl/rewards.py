"""Keeps the step rewards that TRL, which reads numbers alone, would drop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import is_async_callable

from ...rewards.steps import StepReward, StepRewards, check_steps
from ..checks import check_finite_rewards
from .log import PendingLog


class RewardCalls:
    """
    TRL's calls of the reward functions, with the step rewards among their results.

    Args:
        calculate (`Callable`): TRL's method, `(inputs, prompts, completions, completion_ids) -> (N, F)`.
        reward_funcs (`list`): functions and models, as it calls them.
        names (`list[str]`): their names.
        pending_log ([`PendingLog`]): of the run.
    """

    def __init__(
        self,
        calculate: Callable[..., torch.Tensor],
        reward_funcs: list[Any],
        names: list[str],
        pending_log: PendingLog,
    ):
        self.calculate, self.names, self.pending_log = calculate, names, pending_log
        self.functions = [
            func if isinstance(func, nn.Module) else self._keeping(number, func)
            for number, func in enumerate(reward_funcs)
        ]
        self._by_function: dict[int, list[Any]] = {}

    def score(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids: list[list[int]]
    ) -> tuple[torch.Tensor, StepRewards]:
        """float32 `(N, F)`, the rewards of all processes; and this process's rewards with places in the text."""
        self._by_function = {}
        rewards_per_func = self.calculate(inputs, prompts, completions, completion_ids)
        check_finite_rewards(rewards_per_func, self.names)
        return rewards_per_func, StepRewards(self._by_function, completions, completion_ids)

    def score_unlogged(self, *args: Any) -> tuple[torch.Tensor, StepRewards]:
        """Rewards of responses outside of the rollout. Reward functions log about the rollout's responses only."""
        with self.pending_log.without_additions():
            return self.score(*args)

    def _keeping(self, number: int, func: Callable) -> Callable:
        """The function, which also keeps its results here if there are step rewards among them."""

        def keep(rewards: Any, kwargs: dict[str, Any]) -> list[Any]:
            rewards, name = list(rewards), self.names[number]
            steps = [reward.steps for reward in rewards if isinstance(reward, StepReward)]
            if steps:
                check_steps(name, rewards, kwargs["completions"])
                self._by_function[number] = rewards
                placed = sum(step.reward for of_one in steps for step in of_one)
                kwargs["log_metric"](f"rewards/{name}/steps", sum(map(len, steps)) / len(rewards))
                kwargs["log_metric"](f"rewards/{name}/placed", placed / len(rewards))
            return rewards

        if is_async_callable(func):

            async def call(**kwargs):
                return keep(await func(**kwargs), kwargs)

        else:

            def call(**kwargs):
                return keep(func(**kwargs), kwargs)

        return functools.update_wrapper(call, func)
