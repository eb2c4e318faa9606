"""Monte-Carlo rollouts: the policy samples several continuations of a prefix, which are then scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from .prompts import TokenizedPrompts


@dataclass
class StateValues:
    """
    Monte-Carlo values of some states, and the cost of estimating them.

    Args:
        values (`torch.Tensor`):
            float32 `(N,)`, the mean reward of each state's continuations; NaN without any reward. A reward for a step
            before the state does not count.
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

    A *state* is a prompt and the first tokens of a response to it. A prefix with its continuation has the same length
    limit as the response. So its reward is a sample of the policy's reward from that state on.

    Args:
        prompts ([`TokenizedPrompts`]): of this process's rollout.
        groups (`Sequence[Hashable]`): one value for each of `prompts`. Equal values mean equal prompts.
        generate (`Callable`):
            `(prompts, max_new_tokens) -> list[list[int]]`, one sampled continuation for each prompt, up to and
            including the end-of-sequence token.
        score (`Callable`):
            `(rows, completions, starts) -> torch.Tensor`, float32 `(N, F)` rewards of whole completions (token ids) of
            the prompts `rows` by `F` reward functions, without the rewards for steps before the tokens `starts`.
        weigh (`Callable`): `(N, F) -> (N,)`, one reward for each completion.
        end_token_ids (`frozenset[int]`): tokens that end a response.
        max_completion_length (`int`): tokens of a response at most, prefix included.
        rows_per_call (`int`): continuations generated, or completions scored, at a time.
        breaking_token_ids (`frozenset[int]`, *optional*):
            image placeholders. A response cannot go on behind one, although it has not ended.
        max_over_processes (`Callable`, *optional*):
            largest value of an `int` among all processes. Generation and reward functions may be collective: every
            process calls them equally often and with as many rows.
    """

    prompts: TokenizedPrompts
    groups: Sequence[Hashable]
    generate: Callable[[TokenizedPrompts, int], list[list[int]]]
    score: Callable[[list[int], list[list[int]], list[int]], torch.Tensor]
    weigh: Callable[[torch.Tensor], torch.Tensor]
    end_token_ids: frozenset[int]
    max_completion_length: int
    rows_per_call: int
    breaking_token_ids: frozenset[int] = frozenset()
    max_over_processes: Callable[[int], int] = int

    def values_at(
        self,
        states: torch.Tensor,
        completion_ids: torch.Tensor,
        num_continuations: int,
        truncated_reward: float | None = None,
    ) -> StateValues:
        """
        Estimate the values of states within the rollout's responses, see [`ContinuationSampler.values`].

        Args:
            states (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens whose preceding states are meant.
            completion_ids (`torch.Tensor`): int64 tensor of shape `(B, T)`, one response to each of the prompts.
            num_continuations (`int`): continuations of each different state.
            truncated_reward (`float`, *optional*): reward of a continuation that did not end.

        Returns:
            [`StateValues`]: of the states in the order of `states.nonzero()`.
        """
        rows, positions = (index.tolist() for index in states.nonzero(as_tuple=True))
        ids = completion_ids.tolist()
        prefixes = [ids[row][:position] for row, position in zip(rows, positions, strict=True)]
        return self.values(rows, prefixes, num_continuations, truncated_reward)

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
                reward of a continuation that did not end; by default the reward functions' own.

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
        starts = [len(prefix) for prefix in request_prefixes]
        rewards = self.outcomes(self.scores(request_rows, completions, starts), completions, truncated_reward)
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

    def can_go_on(self, completion: list[int]) -> bool:
        """Whether more tokens can follow the completion."""
        if len(completion) >= self.max_completion_length:
            return False
        return not completion or completion[-1] not in self.end_token_ids | self.breaking_token_ids

    def sample(self, rows: Sequence[int], prefixes: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        """
        One continuation for each request.

        Args:
            rows (`Sequence[int]`): prompt of each request.
            prefixes (`Sequence[list[int]]`): response tokens that each request continues.
            limits (`Sequence[int]`): maximum number of tokens of each continuation, at least 1.

        Returns:
            `list[list[int]]`: token ids without the prefixes, up to and including the end-of-sequence token.
        """
        requests = self._filled_up(list(zip(rows, prefixes, limits, strict=True)), filler=(0, [], 1))
        # Requests with similar limits share a call, because a call runs until its longest continuation is done. A
        # continuation cut off at its own limit has the same distribution as a continuation sampled with that limit.
        order = sorted(range(len(requests)), key=lambda request: requests[request][2], reverse=True)
        result: list[list[int]] = [[]] * len(requests)
        for chunk in self._chunks(order):
            prompts = self.prompts.extended(
                [requests[request][0] for request in chunk], [requests[request][1] for request in chunk]
            )
            limit = self.max_over_processes(max(requests[request][2] for request in chunk))
            for request, continuation in zip(chunk, self.generate(prompts, limit), strict=True):
                result[request] = continuation[: requests[request][2]]
        return result[: len(rows)]

    def scores(
        self, rows: Sequence[int], completions: Sequence[list[int]], starts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """float32 `(N, F)`: rewards of completions, without the rewards for steps before the tokens `starts`."""
        starts = [0] * len(rows) if starts is None else starts
        requests = self._filled_up(list(zip(rows, completions, starts, strict=True)), filler=(0, [], 0))
        rewards = [self.score(*map(list, zip(*chunk, strict=True))) for chunk in self._chunks(requests)]
        return torch.cat(rewards)[: len(rows)]

    def outcomes(
        self, rewards_per_func: torch.Tensor, completions: Sequence[list[int]], truncated_reward: float | None
    ) -> torch.Tensor:
        """
        One reward for each completion.

        Args:
            rewards_per_func (`torch.Tensor`): float32 `(N, F)`, of [`ContinuationSampler.scores`].
            completions (`Sequence[list[int]]`): the completions.
            truncated_reward (`float`, *optional*): reward of a completion that did not end.

        Returns:
            `torch.Tensor`: float32 `(N,)`.
        """
        rewards = self.weigh(rewards_per_func)
        if truncated_reward is None:
            return rewards
        ended = torch.tensor([self.has_ended(completion) for completion in completions], dtype=torch.bool)
        return torch.where(ended.to(rewards.device), rewards, truncated_reward)

    def _filled_up(self, requests: list, filler: tuple) -> list:
        """Repeat the first request, so that all processes have as many requests as the process with the most."""
        missing = self.max_over_processes(len(requests)) - len(requests)
        return [*requests, *[requests[0] if requests else filler] * missing]

    def _chunks(self, requests: list) -> list[list]:
        return [requests[i : i + self.rows_per_call] for i in range(0, len(requests), self.rows_per_call)]
