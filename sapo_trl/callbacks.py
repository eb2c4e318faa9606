"""Callbacks for rollouts. [`SegmentationCallback`] logs and records how responses are segmented."""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.image_utils import load_image
from transformers.trainer_callback import TrainerControl, TrainerState

from .config import SAPOConfig
from .files import replacing, write_text
from .metrics import MetricAccumulator, segment_statistics
from .rollouts.types import SegmentedRollout


class RolloutCallback(TrainerCallback):
    """A [`~transformers.TrainerCallback`] that [`SAPOTrainer`] also calls with every rollout, also in evaluation."""

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
            state ([`~transformers.TrainerState`]): state of the training.
            control ([`~transformers.TrainerControl`]): influences the training loop.
            rollout ([`SegmentedRollout`]): this process's responses.
            metrics ([`MetricAccumulator`]):
                collects metrics for the next log entry. Every process must add the same names.
        """

    def on_policy_forward(
        self,
        args: SAPOConfig,
        state: TrainerState,
        control: TrainerControl,
        rows: torch.Tensor,
        log_ratios: torch.Tensor,
    ) -> None:
        """
        Called in training after the policy's forward of each micro-batch, before the optimizer step. It is not called
        while only the critic learns, nor for TRL's own losses, because they do not expose their log-probabilities.

        Args:
            args ([`SAPOConfig`]): settings of the run.
            state ([`~transformers.TrainerState`]): state of the training.
            control ([`~transformers.TrainerControl`]): influences the training loop.
            rows (`torch.Tensor`): int64 `(b,)`, the indices of these responses in the latest rollout.
            log_ratios (`torch.Tensor`):
                float32 `(b, T)`, each token's log-probability minus its log-probability at rollout time; arbitrary
                outside the segments.
        """

    def state_dict(self) -> dict[str, Any]:
        """
        The callback's state on this process, for a checkpoint. A resumed run restores it and continues as if it had
        never been interrupted.

        Returns:
            `dict[str, Any]`: tensors, numbers, strings and images, or lists and dictionaries of them.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restore a state from [`RolloutCallback.state_dict`].

        Args:
            state (`dict[str, Any]`): the state. Several callbacks of one class get their states in their own order.
        """


class SegmentationCallback(RolloutCallback):
    """
    Logs how responses are segmented, and optionally records the segmented responses.

    With every rollout it logs `segments/count`, `segments/length` (and `segments/max_length`),
    `segments/single_token_share`, `segments/entropy_at_cuts` and `segments/entropy_elsewhere`,
    `segments/value_change_at_cuts` and `segments/value_change_elsewhere`. [`SAPOTrainer`] adds this callback if you
    give it none.

    Args:
        output_dir (`str` or `Path`, *optional*):
            folder for rollouts, with one file per rollout and process; by default nothing is written.
        file_format (`str`, *optional*, defaults to `"parquet"`): `"parquet"` or `"json"` (one object per line).
        every (`int`, *optional*, defaults to `1`): write every `every`-th training rollout.
        max_responses (`int`, *optional*): write at most this many responses of a rollout.
        image_size (`int`, *optional*, defaults to `256`):
            longer side of the written images, in pixels. Each image of a prompt is shrunk and written once, to the
            folder `images`. `None` writes no images.
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        file_format: str = "parquet",
        every: int = 1,
        max_responses: int | None = None,
        image_size: int | None = 256,
    ):
        if file_format not in ("parquet", "json"):
            raise ValueError(f'`file_format` must be "parquet" or "json", got {file_format!r}.')
        if every < 1:
            raise ValueError(f"`every` must be at least 1, got {every}.")
        if max_responses is not None and max_responses < 1:
            raise ValueError(f"`max_responses` must be at least 1, got {max_responses}.")
        if image_size is not None and image_size < 1:
            raise ValueError(f"`image_size` must be at least 1, got {image_size}.")
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.file_format = file_format
        self.every = every
        self.max_responses = max_responses
        self.image_size = image_size
        self._num_rollouts = 0
        self._ratios: _RatioRecord | None = None

    def on_rollout(self, args, state, control, rollout, metrics) -> None:
        values = rollout.values if args.learns_critic else None
        for name, (total, count) in segment_statistics(rollout.segments, rollout.entropies, values).items():
            metrics.add_total(name, total, count)
        lengths = rollout.segments.lengths
        metrics.add_max("segments/max_length", lengths.amax() if lengths.numel() else lengths.new_zeros(()))
        if rollout.mode == "train":
            self._ratios = None
            if self.output_dir is not None and self._num_rollouts % self.every == 0:
                name = f"{state.global_step:06d}_{args.process_index:03d}.{self.file_format}"
                self._write(rollout, state.global_step, name)
                mask = rollout.segments.mask[: self.max_responses].cpu()
                self._ratios = _RatioRecord(self.output_dir / f"ratios_{name}", mask)
            self._num_rollouts += 1

    def on_policy_forward(self, args, state, control, rows, log_ratios) -> None:
        if self._ratios is not None:
            self._ratios.add(rows.tolist(), log_ratios.float().cpu())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._ratios is not None and self._ratios.complete:
            # A resumed run may write to another folder.
            self.output_dir.mkdir(parents=True, exist_ok=True)
            _write_rows(self._ratios.path, self._ratios.rows())

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"num_rollouts": self._num_rollouts}
        if self._ratios is not None:
            state["ratios"] = {
                "name": self._ratios.path.name,
                "mask": self._ratios.mask,
                "log_ratios": self._ratios.log_ratios,
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_rollouts = state["num_rollouts"]
        if "ratios" in state and self.output_dir is not None:
            ratios = state["ratios"]
            self._ratios = _RatioRecord(self.output_dir / ratios["name"], ratios["mask"].cpu())
            self._ratios.log_ratios = dict(ratios["log_ratios"])

    def _write(self, rollout: SegmentedRollout, step: int, name: str) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        rows = segmented_responses(rollout, step, self.max_responses)
        if rollout.images is not None and self.image_size is not None:
            for row, images in zip(rows, rollout.images, strict=False):
                row["images"] = [self._save_image(image) for image in images]
        _write_rows(self.output_dir / f"segments_{name}", rows)

    def _save_image(self, image: Any) -> str:
        """The name of an image's file. A missing file is written."""
        image = load_image(image)
        # Hash the pixels. To hash an encoded image, every response's image would have to be encoded first, which would
        # take a hundred times as long.
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:24]
        path = self.output_dir / "images" / f"{digest}.png"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            image.thumbnail((self.image_size, self.image_size))
            with replacing(path) as written:  # other processes may have the same image
                image.save(written, format="PNG")
        return path.name


class _RatioRecord:
    """Collects the latest log-ratios of a rollout's recorded responses, for their file."""

    def __init__(self, path: Path, mask: torch.Tensor):
        self.path, self.mask = path, mask
        self.log_ratios: dict[int, list[float]] = {}

    def add(self, rows: list[int], log_ratios: torch.Tensor) -> None:
        for row, ratios in zip(rows, log_ratios, strict=True):
            if row < len(self.mask):
                self.log_ratios[row] = ratios[self.mask[row]].tolist()

    @property
    def complete(self) -> bool:
        return len(self.log_ratios) == len(self.mask)

    def rows(self) -> list[dict[str, Any]]:
        return [{"response": row, "log_ratios": self.log_ratios[row]} for row in sorted(self.log_ratios)]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        with replacing(path) as written:
            pd.DataFrame(rows).to_parquet(written)
    else:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def segmented_responses(
    rollout: SegmentedRollout, step: int, max_responses: int | None = None
) -> list[dict[str, Any]]:
    """
    One record per response. Its lists have one entry per token in a segment.

    Args:
        rollout ([`SegmentedRollout`]): the rollout.
        step (`int`): optimizer step of the rollout.
        max_responses (`int`, *optional*): largest number of responses to return.

    Returns:
        `list[dict]`: `step`, `prompt`, `reward` (`None` if unscored) and the lists `tokens` (text), `special` (whether
        a token is special), `segment_ids`, `logps`, `entropies`, `values`, `advantages` and `returns`. Tokens outside
        segments, such as tokens from tools, are in `masked_tokens`. For each of them, `masked_positions` has the
        number of segment tokens before it.
    """
    per_token = {
        "segment_ids": rollout.segments.ids,
        "logps": rollout.logps,
        "entropies": rollout.entropies,
        "values": rollout.values,
        "advantages": rollout.advantages,
        "returns": rollout.returns,
    }
    # Transfer each tensor once, instead of once per row.
    columns = {name: tensor[:max_responses].tolist() for name, tensor in per_token.items()}
    # Without the mask, only padding is known to lie outside segments.
    present = rollout.segments.mask if rollout.completion_mask is None else rollout.completion_mask.bool()
    special = set(rollout.tokenizer.all_special_ids)
    rows = []
    for row, (mask, present_row, ids, prompt_ids, prompt_mask, reward) in enumerate(
        zip(
            rollout.segments.mask[:max_responses].tolist(),
            present[:max_responses].tolist(),
            rollout.completion_ids[:max_responses].tolist(),
            rollout.prompt_ids[:max_responses].tolist(),
            rollout.prompt_mask[:max_responses].tolist(),
            rollout.rewards[:max_responses].tolist(),
            strict=True,
        )
    ):
        kept = [position for position, keep in enumerate(mask) if keep]
        masked = [position for position, there in enumerate(present_row) if there and not mask[position]]
        kept_before = [0, *accumulate(map(int, mask))]
        rows.append(
            {
                "step": step,
                "prompt": rollout.tokenizer.decode(
                    [token for token, keep in zip(prompt_ids, prompt_mask, strict=True) if keep]
                ),
                "reward": None if reward != reward else reward,
                "tokens": _texts(rollout.tokenizer, [ids[position] for position in kept]),
                "special": [ids[position] in special for position in kept],
                "masked_tokens": _texts(rollout.tokenizer, [ids[position] for position in masked]),
                "masked_positions": [kept_before[position] for position in masked],
                **{name: [column[row][position] for position in kept] for name, column in columns.items()},
            }
        )
    return rows


def _texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    # For an empty list, `batch_decode` would return one empty text.
    return tokenizer.batch_decode([[token] for token in ids]) if ids else []
