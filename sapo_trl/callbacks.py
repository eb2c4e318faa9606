"""Callbacks that see rollouts: [`SegmentationCallback`] describes and records how responses were segmented."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from .config import SAPOConfig
from .metrics import MetricAccumulator, segment_statistics
from .rollouts import ContinuationSampler
from .segments import Segments


@dataclass
class SegmentedRollout:
    """
    A scored and segmented rollout of this process, before it is cut into micro-batches. `(B, T)` tensors are 0 or
    arbitrary outside the segments.

    Args:
        segments ([`Segments`]): the partition.
        completion_ids (`torch.Tensor`): int64 `(B, T)`.
        prompt_ids (`torch.Tensor`): int64 `(B, P)`.
        prompt_mask (`torch.Tensor`): int64 `(B, P)`.
        logps (`torch.Tensor`): float32 `(B, T)`, log-probabilities under the policy that produced the rollout.
        entropies (`torch.Tensor`): float32 `(B, T)`, of the same policy.
        values (`torch.Tensor`): float32 `(B, T)`, values of the states before each token.
        token_rewards (`torch.Tensor`): float32 `(B, T)`.
        advantages (`torch.Tensor`): float32 `(B, T)`, as the loss uses them.
        returns (`torch.Tensor`): float32 `(B, T)`.
        rewards (`torch.Tensor`): float32 `(B,)`, NaN for a response that no reward function could score.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the completions.
        mode (`str`): `"train"` or `"eval"`.
        continuations ([`~sapo_trl.rollouts.ContinuationSampler`], *optional*):
            samples what the policy makes of a response's prefix; `None` if the trainer did not generate it itself.
    """

    segments: Segments
    completion_ids: torch.Tensor
    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    logps: torch.Tensor
    entropies: torch.Tensor
    values: torch.Tensor
    token_rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    rewards: torch.Tensor
    tokenizer: PreTrainedTokenizerBase
    mode: str
    continuations: ContinuationSampler | None = None


class RolloutCallback(TrainerCallback):
    """A [`~transformers.TrainerCallback`] that [`SAPOTrainer`] also shows every rollout to, in evaluation too."""

    def on_rollout(
        self,
        args: SAPOConfig,
        state: TrainerState,
        control: TrainerControl,
        rollout: SegmentedRollout,
        metrics: MetricAccumulator,
    ) -> None:
        """
        Called once per rollout, on every process.

        Args:
            args ([`SAPOConfig`]): settings of the run.
            state ([`~transformers.TrainerState`]): where training stands.
            control ([`~transformers.TrainerControl`]): to influence the training loop.
            rollout ([`SegmentedRollout`]): this process's responses.
            metrics ([`MetricAccumulator`]):
                what is added here appears in the next log. Every process must add the same names.
        """


class SegmentationCallback(RolloutCallback):
    """
    Logs how responses are segmented, and on request records the segmented responses.

    Logged with every rollout: `segments/count`, `segments/length` (and `segments/max_length`),
    `segments/single_token_share`, `segments/entropy_at_cuts` and `segments/entropy_elsewhere`,
    `segments/value_change_at_cuts` and `segments/value_change_elsewhere`. [`SAPOTrainer`] adds one of these callbacks
    if it is given none.

    Args:
        output_dir (`str` or `Path`, *optional*):
            folder to write rollouts to, one file per rollout and process; by default nothing is written.
        file_format (`str`, *optional*, defaults to `"parquet"`): `"parquet"` or `"json"` (one object per line).
        every (`int`, *optional*, defaults to `1`): write every `every`-th training rollout.
        max_responses (`int`, *optional*): write at most this many responses of a rollout.
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        file_format: str = "parquet",
        every: int = 1,
        max_responses: int | None = None,
    ):
        if file_format not in ("parquet", "json"):
            raise ValueError(f'`file_format` must be "parquet" or "json", got {file_format!r}.')
        if every < 1:
            raise ValueError(f"`every` must be at least 1, got {every}.")
        if max_responses is not None and max_responses < 1:
            raise ValueError(f"`max_responses` must be at least 1, got {max_responses}.")
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.file_format = file_format
        self.every = every
        self.max_responses = max_responses
        self._num_rollouts = 0

    def on_rollout(self, args, state, control, rollout, metrics) -> None:
        values = rollout.values if args.learns_critic else None
        for name, (total, count) in segment_statistics(rollout.segments, rollout.entropies, values).items():
            metrics.add_total(name, total, count)
        lengths = rollout.segments.lengths
        metrics.add_max("segments/max_length", lengths.amax() if lengths.numel() else lengths.new_zeros(()))
        if rollout.mode == "train":
            if self.output_dir is not None and self._num_rollouts % self.every == 0:
                self._write(rollout, state.global_step, args.process_index)
            self._num_rollouts += 1

    def _write(self, rollout: SegmentedRollout, step: int, process_index: int) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        path = self.output_dir / f"segments_{step:06d}_{process_index:03d}.{self.file_format}"
        rows = segmented_responses(rollout, step, self.max_responses)
        if self.file_format == "parquet":
            pd.DataFrame(rows).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def segmented_responses(
    rollout: SegmentedRollout, step: int, max_responses: int | None = None
) -> list[dict[str, Any]]:
    """
    One record per response, with a list entry per token of its segments.

    Args:
        rollout ([`SegmentedRollout`]): the rollout.
        step (`int`): optimizer step at which it was produced.
        max_responses (`int`, *optional*): how many of its responses to return.

    Returns:
        `list[dict]`: `step`, `prompt`, `reward` (`None` if unscored) and the lists `tokens` (text), `segment_ids`,
        `logps`, `entropies`, `values`, `advantages` and `returns`.
    """
    per_token = {
        "segment_ids": rollout.segments.ids,
        "logps": rollout.logps,
        "entropies": rollout.entropies,
        "values": rollout.values,
        "advantages": rollout.advantages,
        "returns": rollout.returns,
    }
    # One transfer per tensor instead of one per row.
    columns = {name: tensor[:max_responses].tolist() for name, tensor in per_token.items()}
    rows = []
    for row, (mask, ids, prompt_ids, prompt_mask, reward) in enumerate(
        zip(
            rollout.segments.mask[:max_responses].tolist(),
            rollout.completion_ids[:max_responses].tolist(),
            rollout.prompt_ids[:max_responses].tolist(),
            rollout.prompt_mask[:max_responses].tolist(),
            rollout.rewards[:max_responses].tolist(),
            strict=True,
        )
    ):
        kept = [position for position, keep in enumerate(mask) if keep]
        rows.append(
            {
                "step": step,
                "prompt": rollout.tokenizer.decode(
                    [token for token, keep in zip(prompt_ids, prompt_mask, strict=True) if keep]
                ),
                "reward": None if reward != reward else reward,
                # Of no tokens, `batch_decode` makes one empty text.
                "tokens": rollout.tokenizer.batch_decode([[ids[position]] for position in kept]) if kept else [],
                **{name: [column[row][position] for position in kept] for name, column in columns.items()},
            }
        )
    return rows
