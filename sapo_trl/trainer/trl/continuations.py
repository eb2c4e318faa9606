"""Responses that are not part of a rollout: generated from prefixes, and scored by the trainer's reward functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import is_conversational
from trl.chat_template_utils import parse_response

from ...distributed import Processes
from ...rewards.steps import StepRewards
from ...rollouts import ContinuationSampler, TokenizedPrompts
from ...rollouts.types import GivenRollout
from .generation import prompts_of


@dataclass
class Continuations:
    """
    Makes samplers of continuations, which generate and score as TRL does for a rollout.

    Args:
        generate (`Callable`): `(prompts, max_new_tokens) -> list[list[int]]`, by the trainer's generation backend.
        rewards (`Callable`):
            `(inputs, prompts, completions, completion_ids) -> (torch.Tensor, StepRewards)`: float32 of shape
            `(P * N, F)`, the rewards of all processes' completions by the trainer's reward functions; and this
            process's rewards with places in the text.
        weigh (`Callable`): `(N, F) -> (N,)`, one reward of each.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): decodes.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the completions.
        tools (`Sequence`): the trainer's tools, for the parser of responses.
        end_token_ids (`frozenset[int]`): tokens that end a response.
        placeholder_ids (`Collection[int]`): tokens that break a response off.
        max_completion_length (`int`, *optional*): tokens of a response at most.
        processes ([`~sapo_trl.distributed.Processes`]): of the run.
    """

    generate: Callable[[TokenizedPrompts, int], list[list[int]]]
    rewards: Callable[[list[dict[str, Any]], list, list, list[list[int]]], tuple[torch.Tensor, StepRewards]]
    weigh: Callable[[torch.Tensor], torch.Tensor]
    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    tokenizer: PreTrainedTokenizerBase
    tools: Sequence[Any]
    end_token_ids: frozenset[int]
    placeholder_ids: Collection[int]
    max_completion_length: int | None
    processes: Processes

    def sampler(
        self,
        prompts: TokenizedPrompts,
        inputs: list[dict[str, Any]],
        generations: int,
        rows_per_call: int,
        given: GivenRollout | None = None,
    ) -> ContinuationSampler:
        """
        Args:
            prompts ([`TokenizedPrompts`]): of this process's rollout.
            inputs (`list[dict]`): the row of the data set of each prompt.
            generations (`int`): how often TRL repeats a row next to itself.
            rows_per_call (`int`): responses that are generated or scored at a time.
            given ([`GivenRollout`], *optional*): the rollout's plan, if TRL did not sample its responses.

        Returns:
            [`~sapo_trl.rollouts.ContinuationSampler`]
        """
        first_row = self.processes.index * len(inputs)
        # TRL repeats a prompt's row next to itself; a plan's rows come in any order, but are the same objects.
        groups = [(first_row + row) // generations if given is None else id(inputs[row]) for row in range(len(inputs))]

        def score(rows: list[int], completions: list[list[int]], starts: list[int]) -> torch.Tensor:
            return self.scores([inputs[row] for row in rows], [prompts.ids[row] for row in rows], completions, starts)

        return ContinuationSampler(
            prompts=prompts,
            groups=groups,
            generate=self.generate,
            score=score,
            weigh=self.weigh,
            end_token_ids=self.end_token_ids,
            breaking_token_ids=frozenset(self.placeholder_ids),
            max_completion_length=self.max_completion_length,
            rows_per_call=rows_per_call,
            max_over_processes=self.processes.max,
        )

    def scores(
        self,
        inputs: list[dict[str, Any]],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        starts: list[int],
    ) -> torch.Tensor:
        """
        Args:
            inputs (`list[dict]`): the row of the data set of each of `N` completions.
            prompt_ids (`list[list[int]]`): token ids of their prompts.
            completion_ids (`list[list[int]]`): their own.
            starts (`list[int]`): tokens of each completion whose rewards do not count.

        Returns:
            `torch.Tensor`: float32 `(N, F)`, the rewards of this process's completions from their starts on.
        """
        prompts = prompts_of(inputs)
        completions = self._decoded(prompts, prompt_ids, completion_ids)
        rewards, steps = self.rewards(inputs, prompts, completions, completion_ids)
        own = self.processes.own_rows(rewards, len(inputs)).clone()
        for place in steps.placed(self.tokenizer, prompt_ids, [[True] * len(ids) for ids in completion_ids]):
            if place.position < starts[place.row]:
                own[place.row, place.function] -= place.reward
        return own

    def _decoded(self, prompts: list, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list:
        """Completions in the form in which reward functions get them."""
        if not is_conversational({"prompt": prompts[0]}):
            return self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        templates = (getattr(self.tokenizer, name, None) for name in ("response_template", "response_schema"))
        if any(template is not None for template in templates):
            return [
                [parse_response(self.tokenizer, ids, prefix=prefix, tools=self.tools)]
                for prefix, ids in zip(prompt_ids, completion_ids, strict=True)
            ]
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": text}] for text in texts]
