"""The test split of a run file as a benchmark: the prompts, data and reward functions of the training."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import rich
import yaml
from datasets import Dataset
from trl import ModelConfig
from trl.trainer.utils import get_callable_name, is_async_callable

from ..cli.run_arguments import parse_run
from ..cli.train import EMBEDDED, TrainArguments, load_prompts
from ..config import SAPOConfig
from ..embedded import default_cache_dir, load_processor, warm_start
from ..rewards.calls import checked_reward
from ..rewards.completion import answer_part, last_boxed
from ..rewards.lookup import find_reward
from ..rewards.signatures import check_reward_arguments
from ..run_files import find_run_file
from .benchmark import TASK, Benchmark, Problem, Result, Score
from .benchmarks.rows import to_image
from .settings import EvalArguments


PROGRAM = "sapo-trl eval"
REWARD = "reward"
"""The weighted sum of all rewards, as in the trainer's log."""

_TRAINING = (TrainArguments, SAPOConfig, ModelConfig)
_OF_TRAINING = {"preset", *(setting.name for kind in _TRAINING for setting in fields(kind))}
_OF_EVALUATION = {field.name for field in fields(EvalArguments)}
# An evaluation scores stored texts. It has neither tokens nor pictures nor a trainer.
_NOT_PASSED = ("completion_ids", "trainer_state", "environments", "images", "image")


def is_run_file(path: str | Path) -> bool:
    """
    Whether a file has settings of `sapo-trl train`, rather than settings of `sapo-trl eval`.

    Args:
        path (`str` or `Path`): a YAML file, or the name of a run file of this package.

    Raises:
        ValueError: if the file has settings that only `train` has and settings that only `eval` has.
        OSError: if there is no such file.
    """
    settings = yaml.safe_load(find_run_file(path).read_text(encoding="utf-8"))
    names = set(settings) if isinstance(settings, dict) else set()
    of_training, of_evaluation = names & (_OF_TRAINING - _OF_EVALUATION), names & (_OF_EVALUATION - _OF_TRAINING)
    if of_training and of_evaluation:
        raise ValueError(
            f"--config: {str(path)!r} has settings of `sapo-trl train` ({', '.join(sorted(of_training)[:3])}) and of "
            f"`sapo-trl eval` ({', '.join(sorted(of_evaluation)[:3])}). Give the settings of `sapo-trl eval` on the "
            "command line."
        )
    return bool(of_training)


def read_run_file(path: str, overrides: Sequence[str]) -> tuple[dict[str, Any], Callable[[EvalArguments], Benchmark]]:
    """
    Read a run file of `sapo-trl train`.

    Args:
        path (`str`): the file, or its name.
        overrides (`Sequence[str]`): arguments of the command line that are settings of `sapo-trl train`.

    Returns:
        `tuple[dict[str, Any], Callable[[EvalArguments], Benchmark]]`: defaults for [`EvalArguments`], and a function
        that makes the benchmark `task` for the evaluation's settings.
    """
    # A dry run takes a file for GPUs on a CPU, too.
    request = parse_run(["--config", path, "--dry_run", *overrides], *_TRAINING, program=PROGRAM)
    if request.launch:
        raise ValueError(f"An evaluation is one process: it takes no options of `accelerate launch`, got {overrides}.")
    arguments, training_args, model_args = request.settings
    defaults = {
        **_trained_model(training_args.output_dir, model_args),
        "benchmarks": [TASK],
        "max_new_tokens": training_args.max_completion_length,
        "chat_template_kwargs": training_args.chat_template_kwargs or None,
        "trust_remote_code": training_args.trust_remote_code,
    }
    return defaults, lambda evaluation: task_benchmark(arguments, training_args, evaluation)


def _trained_model(output_dir: str, model_args: ModelConfig) -> dict[str, Any]:
    """Settings that name the run's model: a whole model, or an adapter on its base model. Empty before training."""
    if (Path(output_dir) / "adapter_config.json").is_file():
        base = {"model": model_args.model_name_or_path, "revision": model_args.model_revision}
        return base | {"adapter": output_dir}
    return {"model": output_dir} if (Path(output_dir) / "config.json").is_file() else {}


def task_benchmark(arguments: TrainArguments, training_args: SAPOConfig, evaluation: EvalArguments) -> Benchmark:
    """
    The test split of a run file.

    A score is the weighted mean of the reward functions, clipped to [0, 1]. So a response is right if every function
    gives 1. The metrics are the trainer's: the weighted sum `reward`, and the mean of each function.

    Args:
        arguments ([`~sapo_trl.cli.train.TrainArguments`]): data and reward functions.
        training_args ([`SAPOConfig`]): weights of the functions, and their time limit.
        evaluation ([`EvalArguments`]): settings of the evaluation.

    Returns:
        [`Benchmark`]. Raises `ValueError` if no reward function can be called without tokens and trainer.
    """
    if evaluation.harness != "sapo-trl" or evaluation.judge_url:
        raise ValueError(
            "A run file's reward functions decide about its answers: neither `harness: lmms-eval` nor `judge_url` can "
            "go with it."
        )
    functions = [find_reward(name, arguments.reward_settings.get(name)) for name in arguments.reward_funcs]
    weights = training_args.reward_weights or [1.0] * len(functions)
    if len(weights) != len(functions):
        raise ValueError(f"`reward_weights` has {len(weights)} weights for {len(functions)} reward functions.")
    usable = [pair for pair in zip(functions, weights, strict=True) if not _needed(pair[0], _NOT_PASSED)]
    left_out = [get_callable_name(function) for function in functions if _needed(function, _NOT_PASSED)]
    if not usable:
        raise ValueError(
            f"reward_funcs: {', '.join(left_out)} cannot be called on texts alone; it needs {', '.join(_NOT_PASSED)}."
        )
    rewards = {
        get_callable_name(function): (checked_reward(function, training_args.reward_timeout), weight)
        for function, weight in usable
    }
    without = f" Left out: {', '.join(left_out)}, which needs more than texts." if left_out else ""
    split = arguments.dataset_test_split
    return Benchmark(
        name=TASK,
        title=f"{Path(arguments.dataset_name).stem} {split}",
        dataset=arguments.dataset_name,
        split=split,
        config=arguments.dataset_config,
        load=lambda: _prompts(arguments, training_args, evaluation, [function for function, _ in usable]),
        to_problem=task_problem,
        score=lambda problem, text: score_with(rewards, problem, text),
        aggregate=mean_rewards,
        headline=REWARD,
        right_answer=None,
        scoring_note=f"prompts and reward functions of the training ({', '.join(rewards)}).{without}",
    )


def _prompts(
    arguments: TrainArguments, training_args: SAPOConfig, evaluation: EvalArguments, functions: Sequence[Callable]
) -> Dataset:
    """The rows with TRL's columns. Raises `ValueError` if a function cannot be called with them."""
    processor = None
    if arguments.max_prompt_length is not None:
        model = str(warm_start(default_cache_dir())) if evaluation.model == EMBEDDED else evaluation.model
        processor = load_processor(model, revision=evaluation.revision, trust_remote_code=evaluation.trust_remote_code)
    arguments.streaming = False  # rows are numbered
    dataset, report = load_prompts(arguments, arguments.dataset_test_split, training_args.seed, processor)
    if report is not None and report.bad:
        rich.print(report)
    columns = [name for name in dataset.column_names if name not in _NOT_PASSED]
    check_reward_arguments(list(functions), columns, arguments.dataset_name)
    return dataset


def task_problem(row: Mapping[str, Any], number: int) -> Problem:
    """A row with TRL's columns as a problem. Columns for reward functions become its fields."""
    pictures = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
    answer = row.get("answer")
    others = {name: value for name, value in row.items() if name not in ("prompt", "answer", "images", "image")}
    if answer is not None and not isinstance(answer, str):
        others["answer"] = answer  # reward functions get it as it is
    return Problem(
        id=str(number),
        prompt=row["prompt"],
        answer="" if answer is None else str(answer),
        images=[to_image(picture, f"`images` in row {number}") for picture in pictures],
        fields=json.loads(json.dumps(others, default=str)),
    )


def score_with(rewards: Mapping[str, tuple[Callable, float]], problem: Problem, text: str) -> Score:
    """
    Score a generation with reward functions.

    Args:
        rewards (`Mapping[str, tuple[Callable, float]]`): functions, as TRL calls them, and their weights, by name.
        problem ([`Problem`]): the problem. Its fields are passed by name, each as a list of one value.
        text (`str`): the generation.

    Returns:
        [`Score`]. Raises `ValueError` if no function applies.
    """
    completion = text if isinstance(problem.prompt, str) else [{"role": "assistant", "content": text}]
    columns = {name: [value] for name, value in problem.fields.items()}
    given = {"prompts": [problem.prompt], "completions": [completion], "answer": [problem.answer], **columns}
    found = {name: _reward(function, given) for name, (function, _) in rewards.items()}
    applied = {name: float(reward) for name, reward in found.items() if reward is not None}
    if not applied:
        raise ValueError(f"none of {', '.join(rewards)} applies to the row")
    total = math.fsum(rewards[name][1] * reward for name, reward in applied.items())
    weight = math.fsum(abs(rewards[name][1]) for name in applied)
    correct = min(1.0, max(0.0, total / weight)) if weight else 0.0
    named = {f"rewards/{name}/mean": reward for name, reward in applied.items()}
    return Score(round(correct, 12), _extracted(text), {REWARD: total, **named})


def mean_rewards(groups: Sequence[Sequence[Result]]) -> dict[str, float]:
    """The mean of each reward over the results that have it. A result without rewards counts as `reward` 0."""
    values: dict[str, list[float]] = {REWARD: []}
    for result in (result for group in groups for result in group):
        for name, reward in ({REWARD: 0.0} | dict(result.rewards)).items():
            values.setdefault(name, []).append(reward)
    return {name: math.fsum(rewards) / len(rewards) for name, rewards in values.items()}


def _reward(function: Callable, given: Mapping[str, Any]) -> float | None:
    result = function(**given, log_extra=_ignore, log_metric=_ignore)
    if is_async_callable(function):
        result = asyncio.run(result)
    return result[0]


def _ignore(*values: Any) -> None:
    """In place of the trainer's `log_metric` and `log_extra`."""


def _extracted(text: str) -> str | None:
    """For the page: the last box, or the last line. `None` for an empty text."""
    return last_boxed(answer_part(text)) or (text.strip().splitlines() or [None])[-1]


def _needed(function: Callable, names: Sequence[str]) -> list[str]:
    """The arguments out of `names` that a function cannot be called without."""
    parameters = inspect.signature(function, follow_wrapped=False).parameters
    return [name for name in names if name in parameters and parameters[name].default is inspect.Parameter.empty]
