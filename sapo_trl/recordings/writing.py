"""Writes the recorded files."""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import replacing, write_text
from .columns import NUMBERS_OF_SOME_RUNS, NUMBERS_OF_TOKENS, SETTINGS_FILE


if TYPE_CHECKING:
    import pandas as pd
    import torch
    from transformers import PreTrainedTokenizerBase

    from ..rollouts.types import SegmentedRollout


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
        a token is special), `segment_ids`, `logps`, `entropies`, `values`, `advantages`, `returns` and `token_rewards`
        (rewards, placed on their tokens). Runs that have them also record the columns [`NUMBERS_OF_SOME_RUNS`], the
        text `answer`, and the lists `reward_names`, `reward_weights` and `reward_values` (`None` if unscored) with one
        entry per reward function. Tokens outside segments, such as tokens from tools, are in `masked_tokens`. For each
        of them, `masked_positions` has the number of segment tokens before it.
    """
    per_token = {"segment_ids": rollout.segments.ids}
    per_token |= {name: getattr(rollout, name) for name in NUMBERS_OF_TOKENS}
    per_token |= {name: tensor for name, tensor in _of_some_runs(rollout).items() if tensor is not None}
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
                **_verdict(rollout, row),
            }
        )
    return rows


def _of_some_runs(rollout: SegmentedRollout) -> dict[str, torch.Tensor | None]:
    """Columns that some runs have; `None` for the others."""
    tensors = {name: getattr(rollout, name) for name in NUMBERS_OF_SOME_RUNS}
    for name in ("policy_mask", "value_states"):
        tensors[name] = None if tensors[name] is None else tensors[name].int()
    if rollout.policy_mask is not None and bool((rollout.policy_mask == rollout.segments.mask).all()):
        tensors["policy_mask"] = None
    return tensors


def _verdict(rollout: SegmentedRollout, row: int) -> dict[str, Any]:
    """The right answer of a response, and the reward of each function."""
    known: dict[str, Any] = {}
    if rollout.answers is not None and rollout.answers[row] is not None:
        known["answer"] = str(rollout.answers[row])
    if rollout.reward_parts is not None:
        values = rollout.reward_parts.rewards[row].tolist()
        known["reward_names"] = rollout.reward_parts.names
        known["reward_weights"] = rollout.reward_parts.weights
        known["reward_values"] = [None if value != value else value for value in values]
    return known


def _texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    # For an empty list, `batch_decode` would return one empty text.
    return tokenizer.batch_decode([[token] for token in ids]) if ids else []


class RatioRecord:
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


def save_image(image: Any, folder: Path, longer_side: int) -> str:
    """Write an image, shrunk to this longer side, unless its file is there already. Returns the file's name."""
    from transformers.image_utils import load_image

    image = load_image(image)
    # Hash the pixels. To hash an encoded image, every response's image would have to be encoded first, which would
    # take a hundred times as long.
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:24]
    path = folder / f"{digest}.png"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        image.thumbnail((longer_side, longer_side))
        with replacing(path) as written:  # other processes may have the same image
            image.save(written, format="PNG")
    return path.name


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the algorithm and the settings of a run beside its recorded files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2, default=str, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows to a Parquet file, or as one JSON object per line; the end of the path decides."""
    if path.suffix == ".parquet":
        import pandas as pd

        write_frame(path, pd.DataFrame(rows))
    else:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a table to a Parquet file."""
    with replacing(path) as written:
        frame.to_parquet(written)
