"""Where an algorithm puts its credit: the advantages of responses that are the same for every algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from ..callbacks.rollout import RolloutCallback
from ..recordings.writing import write_frame
from .task import TaskConfig, exact_values, log_odds, sample_problems


SHOWN_PROBLEMS = 20
GROUP = 8
"""Responses to each problem: algorithms with groups need some. The first of each group is shown."""
CREDIT_NAME = "credit.parquet"
SHOWN_SEED = 11
"""Of the problems, and of the sampling."""


class CreditRecorder(RolloutCallback):
    """
    Records the advantages of a run's last rollout, beside the exact ones.

    The policy does not change, and the random numbers are set before the rollout. So every algorithm sees the same
    responses. The file has one row per problem: `problem` (its index), `reward`, and lists with one entry per token:
    `tokens`, `advantages` as the loss uses them, and `exact`, the change of the exact value at the token.

    Args:
        folder (`Path`): folder for the file.
        task ([`~sapo_trl.study.task.TaskConfig`]): the task.
        model ([`~transformers.PreTrainedModel`]): the policy before training.
        processor: its processor or tokenizer.
        last_rollout (`int`): optimizer step before the last rollout.
    """

    def __init__(self, folder: Path, task: TaskConfig, model: PreTrainedModel, processor: Any, last_rollout: int):
        self.path, self.last_rollout = folder / CREDIT_NAME, last_rollout
        self.problems = sample_problems(task, SHOWN_PROBLEMS, seed=SHOWN_SEED)
        # The mean over free words: the values before them do not know them yet.
        draws = [log_odds(model, processor, task, self.problems, seed=seed).chances for seed in range(4)]
        self.chances = torch.stack(draws).mean(0)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.last_rollout:
            torch.manual_seed(SHOWN_SEED)

    def on_rollout(self, args, state, control, rollout, metrics) -> None:
        if state.global_step != self.last_rollout:
            return
        rows = range(0, SHOWN_PROBLEMS * GROUP, GROUP)
        special = set(rollout.tokenizer.all_special_ids)
        tokens, advantages = [], []
        for row in rows:
            kept = rollout.segments.mask[row].nonzero()[:, 0].tolist()
            kept = [t for t in kept if int(rollout.completion_ids[row, t]) not in special]
            tokens.append(rollout.tokenizer.batch_decode([[int(rollout.completion_ids[row, t])] for t in kept]))
            advantages.append(rollout.advantages[row, kept].tolist())
        values = exact_values(self.problems, tokens, self.chances)
        table = pd.DataFrame(
            {
                "problem": range(SHOWN_PROBLEMS),
                "reward": [float(rollout.rewards[row]) for row in rows],
                "tokens": tokens,
                "advantages": advantages,
                "exact": [[after - before for before, after in zip(v, v[1:], strict=False)] for v in values],
            }
        )
        write_frame(self.path, table)
