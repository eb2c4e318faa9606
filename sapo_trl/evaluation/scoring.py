"""Scores stored generations. This is a separate pass, which can be repeated if the rules or the judge change."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from ..files import replacing
from .benchmark import Benchmark, Problem
from .judge import Judge
from .progress import Steps
from .store import GenerationStore, read_table, stored_problem


SCORES_NAME = "scores.parquet"
RULES = "rules"
SCORES = pa.schema(
    {
        "benchmark": pa.string(),
        "row": pa.int64(),
        "id": pa.string(),
        "generation": pa.int64(),
        "correct": pa.float64(),
        "extracted": pa.string(),
        "rules": pa.float64(),  # the score of the rules, also if a judge decided
        "scorer": pa.string(),
        "error": pa.string(),
        "rewards": pa.string(),  # JSON; empty for benchmarks without reward functions
    }
)


def score_run(
    folder: Path,
    store: GenerationStore,
    benchmarks: Mapping[str, Benchmark],
    console: Console,
    judge: Judge | None = None,
    judge_when: str = "wrong",
) -> list[dict[str, Any]]:
    """
    Score all stored generations, and store the scores in the same folder.

    Args:
        folder (`Path`): the run folder.
        store ([`GenerationStore`]): its generations.
        benchmarks (`Mapping[str, Benchmark]`): by name. Generations of other benchmarks are not scored.
        console ([`~rich.console.Console`]): console for the progress.
        judge ([`Judge`], *optional*): decides after the rules.
        judge_when (`str`): `"wrong"` or `"all"`, see [`EvalArguments`].

    Returns:
        `list[dict]`: rows of [`SCORES`], in the order of [`GenerationStore.generations`].
    """
    problems = {(row["benchmark"], row["row"]): stored_problem(row) for row in store.problems()}
    generations = [row for row in store.generations() if row["benchmark"] in benchmarks]
    for row in generations:
        if (row["benchmark"], row["row"]) not in problems:
            raise ValueError(
                f"{str(folder)!r} has generations of {row['benchmark']} {row['id']!r}, but its folder `problems` "
                "lacks the problem. A file was lost there."
            )
    scores = []
    with Steps(console, "Scoring", len(generations)) as steps:
        for row in generations:
            problem = problems[row["benchmark"], row["row"]]
            scores.append(_score(benchmarks[row["benchmark"]], problem, row))
            steps.advance()
    if judge is not None:
        texts = [row["text"] for row in generations]
        asked = [score["correct"] < 1.0 or judge_when == "all" for score in scores]
        samples = [
            (index, problems[score["benchmark"], score["row"]], text)
            for index, (score, text, ask) in enumerate(zip(scores, texts, asked, strict=True))
            if ask
        ]
        _judge(judge, samples, scores, console)
    with replacing(folder / SCORES_NAME) as temporary:
        pq.write_table(pa.Table.from_pylist(scores, SCORES), temporary)
    return scores


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """The scores of a run folder: rows of [`SCORES`]. Empty if nothing has been scored."""
    path = folder / SCORES_NAME
    return read_table(path, SCORES).to_pylist() if path.is_file() else []


def _score(benchmark: Benchmark, problem: Problem, row: dict[str, Any]) -> dict[str, Any]:
    entry = {name: row[name] for name in ("benchmark", "row", "id", "generation")}
    try:
        score = benchmark.score(problem, row["text"])
    except Exception as error:  # a text that raises any kind of error must not end the scoring of other texts
        return entry | {
            "correct": 0.0,
            "extracted": None,
            "rules": 0.0,
            "scorer": RULES,
            "error": f"{type(error).__name__}: {error}",
            "rewards": "{}",
        }
    return entry | {
        "correct": score.correct,
        "extracted": score.extracted,
        "rules": score.correct,
        "scorer": RULES,
        "error": None,
        "rewards": json.dumps(dict(score.rewards)),
    }


def _judge(
    judge: Judge, samples: Sequence[tuple[int, Problem, str]], scores: list[dict[str, Any]], console: Console
) -> None:
    """Replace the rules' scores by the judge's verdicts. Without a verdict, the rules' score stays."""
    with Steps(console, f"Asking {judge.name}", len(samples)) as steps:
        verdicts = judge.verdicts([(problem, text) for _, problem, text in samples], steps.advance)
    for (index, _, _), verdict in zip(samples, verdicts, strict=True):
        if verdict is None:
            scores[index]["error"] = f"{judge.name} gave no verdict"
        else:
            scores[index] |= {"correct": float(verdict), "scorer": judge.name}
