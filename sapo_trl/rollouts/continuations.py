"""Monte-Carlo rollouts: what the policy makes of a prefix, several times over, and the rewards of that."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .prompts import TokenizedPrompts


@dataclass
class StateValues:
    """
    Monte-Carlo values of some states, and what they cost.

    Args:
        values (`torch.Tensor`): float32 `(N,)`, the mean reward of each state's continuations; NaN without any reward.
        rewards (`torch.Tensor`): float32 `(N, K)`, NaN for a continuation that no reward function could score.
        num_states (`int`): different states among the `N`; only these were continued.
        num_tokens (`int`): tokens that were generated.
        seconds (`float`): spent on generating and scoring.
    """

    values: torch.Tensor
    rewards: torch.Tensor
    num_states: int
    num_tokens: int
    seconds: float


@dataclass
class ContinuationSampler:
    """
    Samples continuations of exact prefixes and scores them, all prefixes at once.

    A *state* is a prompt and the first tokens of a response to it. A continuation may grow as long as the response
    could have, so that its reward is a sample of what the policy would have got from there.

    Args:
        prompts ([`TokenizedPrompts`]): of this process's rollout.
        groups (`Sequence[int]`): which of `prompts` are the same prompt: equal numbers, equal prompts.
        generate (`Callable`):
            `(prompts, max_new_tokens) -> list[list[int]]`, one sampled continuation for each prompt, up to and
            including the end-of-sequence token.
        score (`Callable`):
            `(rows, completions) -> torch.Tensor`, float32 `(N, F)` rewards of whole completions (token ids) of the
            prompts `rows` by `F` reward functions.
        weigh (`Callable`): `(N, F) -> (N,)`, one reward of each.
        end_token_ids (`frozenset[int]`): tokens that end a response.
        max_completion_length (`int`): tokens of a response at most, prefix included.
        rows_per_call (`int`): continuations generated at a time.
        max_over_processes (`Callable`, *optional*):
            largest value of an `int` among all processes. Generation and reward functions may be collective: every
            process calls them equally often.
    """

    prompts: TokenizedPrompts
    groups: Sequence[int]
    generate: Callable[[TokenizedPrompts, int], list[list[int]]]
    score: Callable[[list[int], list[list[int]]], torch.Tensor]
    weigh: Callable[[torch.Tensor], torch.Tensor]
    end_token_ids: frozenset[int]
    max_completion_length: int
    rows_per_call: int
    max_over_processes: Callable[[int], int] = int

    def values(
        self,
        rows: Sequence[int],
        prefixes: Sequence[list[int]],
        num_continuations: int,
        truncated_reward: float | None = None,
    ) -> StateValues:
        """
        Estimate the values of states.

        Args:
            rows (`Sequence[int]`): prompt of each of the `N` states.
            prefixes (`Sequence[list[int]]`): response tokens of each state.
            num_continuations (`int`): continuations of each different state.
            truncated_reward (`float`, *optional*):
                reward of a continuation that did not end; by default what the reward functions say.

        Returns:
            [`StateValues`]
        """
        started = time.perf_counter()
        states: dict[tuple, int] = {}
        index = [
            states.setdefault((self.groups[row], tuple(prefix)), len(states))
            for row, prefix in zip(rows, prefixes, strict=True)
        ]
        first = {state: position for position, state in reversed(list(enumerate(index)))}
        if self.max_over_processes(len(states)) == 0:
            return StateValues(torch.zeros(0), torch.zeros(0, num_continuations), 0, 0, 0.0)
        # `num_continuations` requests for each state, next to each other.
        request_rows = [rows[first[state]] for state in range(len(states)) for _ in range(num_continuations)]
        request_prefixes = [prefixes[first[state]] for state in range(len(states)) for _ in range(num_continuations)]
        limits = [self.max_completion_length - len(prefix) for prefix in request_prefixes]
        continuations = self.sample(request_rows, request_prefixes, limits)
        completions = [prefix + more for prefix, more in zip(request_prefixes, continuations, strict=True)]
        rewards = self.weigh(self.scores(request_rows, completions))
        if truncated_reward is not None:
            ended = torch.tensor([self.has_ended(completion) for completion in completions], dtype=torch.bool)
            rewards = torch.where(ended.to(rewards.device), rewards, truncated_reward)
        rewards = rewards.view(len(states), num_continuations)[index]
        return StateValues(
            values=rewards.nanmean(dim=1),
            rewards=rewards,
            num_states=len(states),
            num_tokens=sum(map(len, continuations)),
            seconds=time.perf_counter() - started,
        )

    def has_ended(self, completion: list[int]) -> bool:
        """Whether the last token ends the response."""
        return bool(completion) and completion[-1] in self.end_token_ids

    def sample(self, rows: Sequence[int], prefixes: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        """
        One continuation for each request.

        Args:
            rows (`Sequence[int]`): prompt of each request.
            prefixes (`Sequence[list[int]]`): response tokens that it continues.
            limits (`Sequence[int]`): tokens it may have at most, each at least 1.

        Returns:
            `list[list[int]]`: token ids without the prefixes, up to and including the end-of-sequence token.
        """
        # Similar limits together: a call runs until its longest is done. A continuation cut off behind its own limit
        # is distributed as one sampled with it.
        order = sorted(range(len(rows)), key=lambda request: limits[request], reverse=True)
        calls = self.max_over_processes(math.ceil(len(rows) / self.rows_per_call))
        result: list[list[int]] = [[]] * len(rows)
        for call in range(calls):
            requests = order[call * self.rows_per_call : (call + 1) * self.rows_per_call]
            # A process that has less to do than others calls along with a token to spare.
            prompts = self.prompts.extended(
                [rows[request] for request in requests] or [0], [prefixes[request] for request in requests] or [[]]
            )
            limit = max((limits[request] for request in requests), default=1)
            for request, continuation in zip(requests, self.generate(prompts, limit), strict=False):
                result[request] = continuation[: limits[request]]
        return result

    def scores(self, rows: Sequence[int], completions: Sequence[list[int]]) -> torch.Tensor:
        """float32 `(N, F)`: rewards of completions, by one call of the reward functions."""
        number = self.max_over_processes(len(rows))
        missing = number - len(rows)
        filler_row, filler = (rows[0], completions[0]) if rows else (0, [])
        rewards = self.score([*rows, *[filler_row] * missing], [*completions, *[filler] * missing])
        return rewards[: len(rows)]
