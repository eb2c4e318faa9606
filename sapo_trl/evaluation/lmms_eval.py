"""Runs lmms-eval's tasks instead of ours: its command line, and its results for our table."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..json_files import Each, read_json
from .settings import EvalArguments


RESULTS_FOLDER = "lmms-eval"
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Task:
    """
    A task of lmms-eval (0.7.3).

    Args:
        name (`str`): name for its `--tasks`.
        metric (`str`): name of the metric in its results, with the filter.
        scale (`float`, *optional*, defaults to `1.0`): the perfect score.
        headline (`str`, *optional*, defaults to `"accuracy"`): our name of the metric.
        asks_judge (`bool`, *optional*, defaults to `False`): whether a GPT model scores (set up as in its docs).
    """

    name: str
    metric: str
    scale: float = 1.0
    headline: str = "accuracy"
    asks_judge: bool = False


TASKS = {
    "logicvista": Task("logicvista_reasoning", "acc_score,none"),
    "mathverse": Task("mathverse_testmini_vision_only", "gpt_eval_score,none", asks_judge=True),
    "wemath": Task("wemath_testmini_reasoning", "wemath_strict,none", headline="strict"),
    "mathvista": Task("mathvista_testmini_cot_reasoning", "acc_score,none"),
    "dynamath": Task("dynamath_reasoning", "dynamath_worst,none", headline="worst"),
    "scienceqa": Task("scienceqa_img", "exact_match,none"),
    "mmmu": Task("mmmu_val", "mmmu_acc,none"),
    "mmbench": Task("mmbench_en_dev_static", "gpt_eval_score,none", scale=100.0),
    "mmstar": Task("mmstar", "average,none"),
    "gsm8k": Task("gsm8k_cot_zeroshot", "exact_match,flexible-extract"),
}
"""
lmms-eval's task for each of our benchmarks. Two are missing. For Geo3K lmms-eval has another data set (four choices, a
letter as answer). It scores MATH500 only with a GPT model.
"""

MODELS = {"transformers": ("qwen2_5_vl", "pretrained"), "vllm": ("vllm", "model")}
"""By backend: lmms-eval's kind of model, and its argument for the name of the weights."""


class HarnessError(RuntimeError):
    """lmms-eval failed, or left no results."""


def harness_command(arguments: EvalArguments, names: Sequence[str], output: Path) -> list[str]:
    """
    The command line as a list, because it never passes through a shell.

    Args:
        arguments ([`EvalArguments`]): model, sampling, `harness_python`.
        names (`Sequence[str]`): our names of the benchmarks.
        output (`Path`): folder for its results.

    Raises:
        ValueError: for benchmarks and settings that lmms-eval does not support.
    """
    if not arguments.harness_python:
        raise ValueError(
            "harness='lmms-eval' needs `harness_python`, the Python of a separate environment with lmms-eval: it pins "
            "other versions than this package."
        )
    missing = [name for name in names if name not in TASKS]
    if missing:
        raise ValueError(
            f"benchmarks: harness='lmms-eval' has no task for {', '.join(missing)}; it has {', '.join(TASKS)}."
        )
    if arguments.n != 1:
        raise ValueError(f"harness='lmms-eval' generates once: `n` must be 1, got {arguments.n}.")
    unsupported = [name for name in ("adapter", "revision", "judge_url", "min_pixels") if getattr(arguments, name)]
    if unsupported:
        raise ValueError(f"harness='lmms-eval' does not take {', '.join(f'`{name}`' for name in unsupported)}.")
    if "," in arguments.model or "=" in arguments.model:
        raise ValueError(f"model={arguments.model!r}: harness='lmms-eval' takes no names with commas or equals signs.")
    kind, weights = MODELS[arguments.backend]
    model_args = {weights: arguments.model}
    if arguments.max_pixels:
        model_args["max_pixels"] = arguments.max_pixels
    sampling = {
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "do_sample": arguments.temperature > 0,
        "max_new_tokens": arguments.max_new_tokens,
    }
    command = [arguments.harness_python, "-m", "lmms_eval"]
    command += ["--model", arguments.harness_model or kind, "--model_args", _pairs(model_args)]
    command += ["--tasks", ",".join(TASKS[name].name for name in names), "--gen_kwargs", _pairs(sampling)]
    command += ["--batch_size", str(arguments.batch_size or 1), "--seed", str(arguments.seed)]
    command += ["--output_path", str(output), "--log_samples"]
    if arguments.limit:
        command += ["--limit", str(arguments.limit)]
    return command


def run_harness(arguments: EvalArguments, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """
    Run lmms-eval and read its results.

    Args:
        arguments ([`EvalArguments`]): as for [`harness_command`].
        names (`Sequence[str]`): our names of the benchmarks.

    Returns:
        `dict[str, dict]`: by benchmark, in the form of [`~sapo_trl.evaluation.results.run_results`].

    Raises:
        HarnessError: if lmms-eval fails.
    """
    output = arguments.run_folder / RESULTS_FOLDER
    command = harness_command(arguments, names, output)
    output.mkdir(parents=True, exist_ok=True)
    before = set(output.rglob("*_results.json"))
    try:
        result = subprocess.run(command)
    except OSError as error:
        raise HarnessError(f"harness_python={arguments.harness_python!r} cannot be run: {error}") from error
    if result.returncode != 0:
        raise HarnessError(f"lmms-eval ended with exit code {result.returncode}; its command was {command}.")
    written = sorted(set(output.rglob("*_results.json")) - before)
    if not written:
        raise HarnessError(f"lmms-eval has written no results to {str(output)!r}; its command was {command}.")
    return read_harness_results(read_json(written[-1], {"results": Each(dict)}), names)


def read_harness_results(content: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """
    Read benchmarks from the content of lmms-eval's `*_results.json`.

    Args:
        content (`Mapping`): content of the file.
        names (`Sequence[str]`): our names of the benchmarks.

    Raises:
        HarnessError: if a metric is missing or not a number.
    """
    benchmarks = {}
    for name in names:
        task = TASKS[name]
        metrics = content.get("results", {}).get(task.name, {})
        value = _number(metrics.get(task.metric))
        if value is None:
            raise HarnessError(
                f"lmms-eval's results have no number for {task.metric!r} of {task.name!r}, but "
                f"{metrics.get(task.metric)!r}. The results have the metrics {sorted(metrics)}."
            )
        metric, _, kept = task.metric.partition(",")
        error = _number(metrics.get(f"{metric}_stderr,{kept}"))  # "N/A" if lmms-eval computes no error
        margin = None if error is None else NORMAL_95 * error
        samples = content.get("n-samples", {}).get(task.name, {})
        effective = int(samples.get("effective", 0))
        version = content.get("lmms_eval_version")
        benchmarks[name] = {
            "title": name,
            "headline": task.headline,
            "scoring_note": f"lmms-eval's task {task.name!r}, its prompts, data and scorer.",
            "problems": effective,
            "belonging": int(samples.get("original", effective)),
            "n": 1,
            "metrics": {
                task.headline: {
                    "value": value / task.scale,
                    "low": None if margin is None else max(0.0, (value - margin) / task.scale),
                    "high": None if margin is None else min(1.0, (value + margin) / task.scale),
                }
            },
            "scorers": {_scorer(task, version): effective},
            "errors": 0,
        }
    return benchmarks


def _scorer(task: Task, version: str | None) -> str:
    return f"lmms-eval{f' {version}' if version else ''}{', GPT judge' if task.asks_judge else ''}"


def _number(value: Any) -> float | None:
    """A number, or a percentage as text, such as We-Math's scores; `None` for anything else."""
    try:
        if isinstance(value, str) and value.endswith("%"):
            return float(value.removesuffix("%")) / 100
        return None if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None


def _pairs(values: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items())
