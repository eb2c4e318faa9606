"""Rewards with a place in the text: [`StepReward`] for reward functions, and its tokens for the trainer."""

from __future__ import annotations

import logging
import math
import operator
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .completion import Completion, message_text


logger = logging.getLogger(__name__)

# A private character, which no chat template mentions.
_PROBE = "\ue000"


class Step(NamedTuple):
    """
    A reward for a span of text.

    Args:
        start (`int`): the span's first character.
        end (`int`, *optional*): the character after its last one; `None` is the end of the message.
        reward (`float`): the reward.
        message (`int`, *optional*, defaults to `-1`): the span's message in a conversation, by default the last one.
    """

    start: int
    end: int | None
    reward: float
    message: int = -1


class StepReward(float):
    """
    A reward whose parts have places in the completion. It is a float: the sum of its parts.

    So a reward function that returns it works with every trainer of TRL. [`SAPOTrainer`] puts each part on the token
    that ends its span; `final` stays on the last token of the completion, like any other reward. Arithmetic gives a
    plain float, without places.

    Args:
        steps (`Iterable[tuple]`):
            `(start, end, reward)` or `(start, end, reward, message)`, see [`Step`]. `start` and `end` count the
            characters of the text that the reward function was given, as in `text[start:end]`.
        final (`float`, *optional*, defaults to `0.0`):
            reward of the whole completion.

    Example:

    ```python
    >>> from sapo_trl.rewards.steps import StepReward

    >>> text = "2+3=6, so 6"
    >>> reward = StepReward([(0, text.index(","), -0.5)], final=1.0)
    >>> float(reward)
    0.5
    ```
    """

    steps: tuple[Step, ...]
    final: float

    def __new__(cls, steps: Iterable[tuple], final: float = 0.0) -> StepReward:
        steps = tuple(Step(*step) for step in steps)
        reward = super().__new__(cls, math.fsum([final, *(step.reward for step in steps)]))
        reward.steps, reward.final = steps, float(final)
        return reward

    def __getnewargs__(self) -> tuple[tuple[Step, ...], float]:
        return self.steps, self.final

    def __repr__(self) -> str:
        return f"StepReward({[tuple(step) for step in self.steps]}, final={self.final})"


def check_steps(name: str, rewards: Sequence[Any], completions: Sequence[Completion]) -> None:
    """
    Args:
        name (`str`): name of the reward function.
        rewards (`Sequence`): its result, a number, [`StepReward`] or `None` for each completion.
        completions (`Sequence`): the completions that it was given.

    Raises:
        ValueError: if a span lies outside its message, or the message does not exist.
    """
    for row, (reward, completion) in enumerate(zip(rewards, completions, strict=True)):
        for step in getattr(reward, "steps", ()):
            place = f"Reward function `{name}`, completion {row} of {len(completions)}: the span {tuple(step)}"
            messages = [completion] if isinstance(completion, str) else completion
            if not -len(messages) <= step.message < len(messages):
                raise ValueError(f"{place} names message {step.message}, but the completion has {len(messages)}.")
            length = len(message_text(messages[step.message]))
            start, end = operator.index(step.start), step.end
            if not 0 <= start <= length or (end is not None and not start < operator.index(end) <= length):
                raise ValueError(
                    f"{place} must lie within the text of its message, 0 <= start < end <= {length}; `end=None` is "
                    "the message's end."
                )


class Placed(NamedTuple):
    """A reward on a token: of completion `row`, by the reward function number `function`."""

    row: int
    position: int
    function: int
    reward: float


@dataclass(frozen=True)
class StepRewards:
    """
    The step rewards among the results of reward functions.

    Args:
        by_function (`dict[int, Sequence]`): results of the functions that returned any, by the functions' numbers.
        completions (`Sequence`): the completions that the functions were given.
        completion_ids (`Sequence[Sequence[int]]`): token ids of each completion.
    """

    by_function: dict[int, Sequence[Any]]
    completions: Sequence[Completion]
    completion_ids: Sequence[Sequence[int]]

    def finals(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        """float `(N, F)`: the rewards without the steps, from the rewards of these completions `(N, F)`."""
        finals = rewards_per_func.clone()
        for row, function, reward in self._scored():
            finals[row, function] = reward.final
        return finals

    def placed(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[Sequence[int]],
        is_sampled: Sequence[Sequence[bool]],
    ) -> list[Placed]:
        """
        Find the token of each step: the token that completes the span's last character.

        Text that the policy did not write, such as a tool's answer, has no token to reward. Such a step belongs to the
        policy's last token before it, or to the policy's first token if there is none before. The completions that
        have no sampled token are left out.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the completions.
            prompt_ids (`Sequence[Sequence[int]]`): token ids of each prompt.
            is_sampled (`Sequence[Sequence[bool]]`): for each token of each completion, whether the policy learns it.
        """
        found = []
        for row, function, reward in self._scored():
            ids = list(self.completion_ids[row])
            sampled = [position for position in range(len(ids)) if is_sampled[row][position]]
            if sampled:
                texts = _Texts(tokenizer, self.completions[row], list(prompt_ids[row]), ids, sampled)
                for step in reward.steps:
                    place = bisect_left(sampled, texts.last_token(step) + 1) - 1
                    found.append(Placed(row, sampled[max(place, 0)], function, float(step.reward)))
        return found

    def _scored(self) -> Iterator[tuple[int, int, StepReward]]:
        """Row, function and reward, for each completion with steps."""
        for function, rewards in self.by_function.items():
            for row, reward in enumerate(rewards):
                if isinstance(reward, StepReward) and not math.isnan(reward):
                    yield row, function, reward


@dataclass
class _Texts:
    """The messages of a completion and the tokens that they were read from."""

    tokenizer: PreTrainedTokenizerBase
    completion: Completion
    prompt_ids: list[int]
    ids: list[int]
    sampled: list[int]

    def last_token(self, step: Step) -> int:
        """The token that completes a step."""
        messages = [self.completion] if isinstance(self.completion, str) else self.completion
        index = range(len(messages))[step.message]
        begin, end = self._tokens_of(messages, index)
        if step.end is None or _role(messages[index]) != "assistant":
            return end - 1
        ids, text = self.ids[begin:end], message_text(messages[index])
        # As TRL decodes a completion, unless the tokenizer has a parser of messages.
        whole, start, skip = self._decoded(ids, True), 0, True
        if whole != text:
            whole, skip = self._decoded(ids, False), False
            start = self._place(text, whole, self.prompt_ids + self.ids[:begin])
        if start is None:
            logger.warning("A message's text was not found in its tokens. Its step rewards are placed at its end.")
            return end - 1
        goal = start + step.end

        def length(number: int) -> int:
            # The part that is final. A token may hold only the first bytes of a character.
            return len(commonprefix([self._decoded(ids[:number], skip), whole]))

        return begin + bisect_left(range(len(ids)), goal, lo=1, key=length) - 1

    def _tokens_of(self, messages: Sequence[Any], index: int) -> tuple[int, int]:
        """Begin and end of the tokens of a message; of a tool's answer, of the turn that called the tool."""
        if len(messages) == 1:  # also several turns of a `rollout_func`, which TRL decodes as one
            return 0, len(self.ids)
        sampled = set(self.sampled)
        begins = [place for place in self.sampled if place - 1 not in sampled]
        ends = [place + 1 for place in self.sampled if place + 1 not in sampled]
        turn = sum(_role(message) == "assistant" for message in messages[: index + 1]) - 1
        turn = min(max(turn, 0), len(begins) - 1)
        return begins[turn], ends[turn]

    def _decoded(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def _place(self, text: str, whole: str, prefix: list[int]) -> int | None:
        """The place of a message's text in its turn. If there are several, the tokenizer's parser decides."""
        places = list(_occurrences(text, whole))
        if len(places) < 2:
            return places[0] if places else None
        probe = _PROBE * len(text)
        return next(
            (
                place
                for place in places
                if self._content(whole[:place] + probe + whole[place + len(text) :], prefix) == probe
            ),
            None,
        )

    def _content(self, response: str, prefix: list[int]) -> str | None:
        try:
            return self.tokenizer.parse_response(response, prefix=prefix).get("content")
        except (AttributeError, TypeError, ValueError):  # no parser, or the probe has broken a tool's call
            return None


def _role(message: Any) -> str:
    return "assistant" if isinstance(message, str) else message.get("role", "assistant")


def _occurrences(part: str, whole: str) -> Iterator[int]:
    place = whole.find(part) if part else -1
    while place >= 0:
        yield place
        place = whole.find(part, place + 1)
