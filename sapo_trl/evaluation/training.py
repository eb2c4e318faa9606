"""Benchmarks during training, as `eval_dataset` and reward function of a TRL trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset, Features, Image, Json, List, Value

from ..rewards.completion import Completion, completion_text
from .benchmark import Benchmark, Problem
from .rows import load_rows


def benchmark_dataset(benchmark: Benchmark, path: str | None = None, **limits: int | None) -> Dataset:
    """
    A benchmark as a data set for TRL's trainers.

    Args:
        benchmark ([`Benchmark`]): the benchmark, such as `BENCHMARKS["geo3k"]`.
        path (`str`, *optional*): folder or file to read instead of its data set.
        **limits (`int`, *optional*): `limit`, `min_pixels`, `max_pixels` of [`~sapo_trl.evaluation.rows.load_rows`].

    Returns:
        [`~datasets.Dataset`]: The columns are `prompt` (messages), `answer`, and `images` if any problem has an image.
        [`benchmark_reward`] reads the further columns `benchmark`, `problem_id` and `fields` (JSON).
    """
    rows = load_rows(benchmark, path, **limits)
    features = {
        # JSON, as in TRL: image blocks have no text, and text blocks have no image.
        "prompt": List({"role": Value("string"), "content": List(Json())}),
        "images": List(Image()),
        "answer": Value("string"),
        "benchmark": Value("string"),
        "problem_id": Value("string"),
        "fields": Json(),
    }

    def example(number: int) -> dict[str, Any]:
        problem = rows.problem(number)
        return {
            "prompt": [_with_blocks(message) for message in problem.prompt],
            "images": problem.images,
            "answer": problem.answer,
            "benchmark": benchmark.name,
            "problem_id": problem.id,
            "fields": problem.fields,
        }

    dataset = Dataset.from_dict({"number": rows.numbers}).map(
        example,
        input_columns="number",
        remove_columns="number",
        features=Features(features),
        load_from_cache_file=False,  # the cache's key would consist of the numbers only
    )
    return dataset if any(map(len, dataset.with_format("arrow")["images"])) else dataset.remove_columns("images")


def benchmark_reward(benchmark: Benchmark) -> Callable[..., list[float | None]]:
    """
    A reward function with the benchmark's scorer.

    Args:
        benchmark ([`Benchmark`]): the benchmark.

    Returns:
        `Callable`: takes `completions` and the columns of [`benchmark_dataset`]. It returns a score in [0, 1] for each
        completion, or `None` for a row of another benchmark. TRL leaves `None` out.
    """

    def reward(
        completions: list[Completion],
        answer: list[str],
        benchmark: list[str] | None = None,
        problem_id: list[str] | None = None,
        fields: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        if benchmark is None:  # no row of the data set belongs to a benchmark
            return [None] * len(completions)
        return [
            scorer(Problem(identity, [], gold, fields=of_problem), completion_text(completion)).correct
            if name == own_name
            else None
            for completion, gold, name, identity, of_problem in zip(
                completions, answer, benchmark, problem_id, fields, strict=True
            )
        ]

    scorer, own_name = benchmark.score, benchmark.name
    reward.__name__ = f"{own_name}_score"  # the name in TRL's log
    return reward


def _with_blocks(message: dict[str, Any]) -> dict[str, Any]:
    """The message with a list as content, because all contents in a column must have the same type."""
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}
