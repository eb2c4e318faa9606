"""Folders as runs leave them behind, written without training anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


SETTINGS = {
    "preset": "sapo",
    "summary": "masks by sight",
    "differences": {"critic": "ladder"},
    "other_settings": {"learning_rate": 1e-4, "seed": 3},
    "value_state": "start",
    "critic": "ladder",
    "whiten_advantages": False,
    "image_corruption": "tokens",
    "image_corruption_share": 0.5,
}
"""A `run.json`."""


def recorded_response(tokens: list[str], *, seed: int = 0, **columns: Any) -> dict[str, Any]:
    """A row as [`~sapo_trl.recordings.segmented_responses`] makes it: random numbers, segments of three."""
    random = np.random.default_rng(seed)
    count = len(tokens)
    return {
        "step": 0,
        "prompt": "<|im_start|>user\nFind AB.<|im_end|>\n",
        "reward": 1.0,
        "tokens": tokens,
        "special": [token.startswith("<|") for token in tokens],
        "masked_tokens": [],
        "masked_positions": [],
        "segment_ids": [place // 3 for place in range(count)],
        "logps": (-random.exponential(0.5, count)).tolist(),
        "entropies": random.exponential(0.5, count).tolist(),
        "values": random.uniform(0, 1, count).tolist(),
        "advantages": random.normal(0, 1, count).tolist(),
        "returns": random.uniform(0, 1, count).tolist(),
        **columns,
    }


def write_rollout(folder: Path, rows: list[dict[str, Any]], step: int = 0, log_ratios: bool = True) -> None:
    """The files of one rollout."""
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([{**row, "step": step} for row in rows]).to_parquet(folder / f"segments_{step:06d}_000.parquet")
    if log_ratios:
        random = np.random.default_rng(step)
        ratios = [random.normal(0, 0.1, len(row["tokens"])).tolist() for row in rows]
        frame = pd.DataFrame({"response": range(len(rows)), "log_ratios": ratios})
        frame.to_parquet(folder / f"ratios_{step:06d}_000.parquet")


def write_log(folder: Path, entries: list[dict[str, float]]) -> None:
    """A `trainer_state.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))


def write_large_run(folder: Path, responses: int = 5000, mean_length: int = 200, rollouts: int = 10) -> None:
    """A run of realistic size: words of a Zipf-like vocabulary of 20,000, and a log of 40 metrics."""
    random = np.random.default_rng(0)
    words = np.array([f" word{index}" if index % 7 else f" {index}\n" for index in range(20_000)])
    frequency = 1 / np.arange(1, len(words) + 1)
    per_rollout = responses // rollouts
    for rollout in range(rollouts):
        rows = []
        for place in range(per_rollout):
            length = int(random.integers(mean_length // 2, mean_length * 3 // 2))
            tokens = [*random.choice(words, size=length - 1, p=frequency / frequency.sum()), "<|im_end|>"]
            prompt = f"<|im_start|>user\nProblem {place // 5}: {'what is it? ' * 20}<|im_end|>\n"
            reward = float(random.integers(0, 2))
            seed = rollout * per_rollout + place
            rows.append(recorded_response([str(token) for token in tokens], seed=seed, prompt=prompt, reward=reward))
        write_rollout(folder / "segments", rows, step=4 * rollout)
    names = ["reward", "entropy", "critic/explained_variance", *(f"metric/{index}" for index in range(37))]
    write_log(folder, [{"step": step, **{name: float(random.normal()) for name in names}} for step in range(200)])
