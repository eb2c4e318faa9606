"""The paper's numbers (https://huggingface.co/papers/2605.01327), for comparison with ours."""

from __future__ import annotations

import re


PAPER = "paper"

MAIN_COLUMNS = ("geo3k", "logicvista", "mathverse", "wemath", "mathvista", "dynamath")
GENERAL_COLUMNS = ("scienceqa", "mmmu", "mmbench", "mmstar")
TEXT_COLUMNS = ("gsm8k", "math500")

METRICS = {
    "geo3k": "accuracy, free form",
    "logicvista": "accuracy",
    "mathverse": "accuracy, vision only",
    "wemath": "strict score",
    "mathvista": "accuracy, testmini",
    "dynamath": "accuracy of the worst case over 10 variants",
    "scienceqa": "accuracy",
    "mmmu": "accuracy",
    "mmbench": "accuracy",
    "mmstar": "accuracy",
    "gsm8k": "accuracy",
    "math500": "accuracy",
}
"""
The compared metrics, in our words. The paper names the benchmarks and one generation at temperature 0.6, top-p 0.95.
The size of its numbers tells that its DynaMath is the worst case and its We-Math the strict score.
"""

MAIN: dict[str, dict[str, tuple[float, ...]]] = {
    "3B": {
        "Qwen2.5-VL-3B": (27.29, 34.45, 24.75, 21.81, 61.60, 10.97),
        "GRPO": (40.60, 40.72, 36.67, 29.43, 63.00, 17.37),
        "PPO": (21.80, 39.15, 26.52, 25.90, 63.80, 9.98),
        "VC-PPO": (34.94, 37.81, 32.36, 32.67, 62.90, 10.78),
        "SAPO": (46.26, 39.60, 37.56, 36.19, 65.40, 16.37),
    },
    "7B": {
        "Qwen2.5-VL-7B": (42.60, 39.15, 30.58, 32.67, 69.30, 13.37),
        "GRPO": (51.58, 45.86, 44.80, 41.05, 69.70, 22.75),
        "PPO": (42.60, 42.73, 39.72, 41.52, 69.80, 17.96),
        "VC-PPO": (48.75, 45.41, 41.37, 40.48, 68.40, 20.76),
        "SAPO": (52.75, 47.30, 45.81, 42.86, 70.70, 21.96),
    },
}
"""Percentages in the order of [`MAIN_COLUMNS`], by size of the model and algorithm."""

MAIN_AVERAGES = {
    "3B": {"Qwen2.5-VL-3B": 30.15, "GRPO": 37.97, "PPO": 31.19, "VC-PPO": 35.24, "SAPO": 40.23},
    "7B": {"Qwen2.5-VL-7B": 37.94, "GRPO": 45.96, "PPO": 42.39, "VC-PPO": 44.20, "SAPO": 46.90},
}
"""The printed column of averages."""

GENERAL_AVERAGES = {"7B": {"Qwen2.5-VL-7B": 71.24, "GRPO": 71.26, "PPO": 71.08, "SAPO": 72.36}}
"""Averages over [`GENERAL_COLUMNS`]. For text (GSM8K, MATH500) we know only the paper's differences."""


def size_of(model: str) -> str | None:
    """The size in a model's name, if the paper has this size (`Qwen2.5-VL-3B-Instruct`: `"3B"`); otherwise `None`."""
    match = re.search(r"(?<![\w.])([37])b(?![a-z0-9])", model, flags=re.IGNORECASE)
    return f"{match[1]}B" if match else None
