"""[`SegmentationCallback`] logs and records how responses are segmented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..closest_preset import DEFAULTS_SUMMARY, closest_preset, other_settings
from ..config import SAPOConfig
from ..metrics import segment_statistics
from ..presets import PRESETS
from ..recordings.columns import file_name
from ..recordings.writing import RatioRecord, save_image, segmented_responses, write_rows, write_settings
from ..rollouts.types import SegmentedRollout
from .rollout import RolloutCallback


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
        self._ratios: RatioRecord | None = None
        self._has_settings = False

    def on_rollout(self, args, state, control, rollout, metrics) -> None:
        values = rollout.values if args.learns_critic else None
        for name, (total, count) in segment_statistics(rollout.segments, rollout.entropies, values).items():
            metrics.add_total(name, total, count)
        lengths = rollout.segments.lengths
        metrics.add_max("segments/max_length", lengths.amax() if lengths.numel() else lengths.new_zeros(()))
        if rollout.mode == "train":
            self._ratios = None
            if self.output_dir is not None and self._num_rollouts % self.every == 0:
                place = (state.global_step, args.process_index, self.file_format)
                self._write(rollout, state.global_step, file_name("segments", *place))
                if args.process_index == 0 and not self._has_settings:
                    write_settings(self.output_dir, recorded_settings(args))
                    self._has_settings = True
                mask = rollout.segments.mask[: self.max_responses].cpu()
                self._ratios = RatioRecord(self.output_dir / file_name("ratios", *place), mask)
            self._num_rollouts += 1

    def on_policy_forward(self, args, state, control, rows, log_ratios) -> None:
        if self._ratios is not None:
            self._ratios.add(rows.tolist(), log_ratios.float().cpu())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._ratios is not None and self._ratios.complete:
            # A resumed run may write to another folder.
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_rows(self._ratios.path, self._ratios.rows())

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
            self._ratios = RatioRecord(self.output_dir / ratios["name"], ratios["mask"].cpu())
            self._ratios.log_ratios = dict(ratios["log_ratios"])

    def _write(self, rollout: SegmentedRollout, step: int, name: str) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        rows = segmented_responses(rollout, step, self.max_responses)
        if rollout.images is not None and self.image_size is not None:
            columns = {"images": rollout.images}
            if rollout.corrupted_images is not None:
                columns["corrupted_images"] = rollout.corrupted_images(len(rows))
            for column, of_rows in columns.items():
                for row, images in zip(rows, of_rows, strict=False):
                    row[column] = [save_image(image, self.output_dir / "images", self.image_size) for image in images]
        write_rows(self.output_dir / name, rows)


def recorded_settings(args: SAPOConfig) -> dict[str, Any]:
    """The algorithm and the settings of a run, see [`~sapo_trl.recordings.columns.SETTINGS_SHAPE`]."""
    closest = closest_preset(args)
    return {
        "preset": closest.name,
        "summary": PRESETS[closest.name].summary if closest.name in PRESETS else DEFAULTS_SUMMARY,
        "differences": closest.differences,
        "other_settings": other_settings(args, closest.name),
        "value_state": args.value_state,
        "critic": args.critic,
        "whiten_advantages": args.whiten_advantages,
        "advantage_clamp": args.advantage_clamp,
        "image_corruption": args.image_corruption,
        "image_corruption_share": args.image_corruption_share,
    }
