"""Computes a run's results from its scores."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..statistics import Interval
from .benchmark import Benchmark, Problem, Result
from .statistics import benchmark_metrics, repeated_metrics
from .store import GenerationStore, stored_problem


RESULTS_NAME = "results.json"


def run_results(
    benchmarks: Mapping[str, Benchmark],
    sizes: Mapping[str, int],
    n: int,
    store: GenerationStore,
    scores: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """
    The metrics of each benchmark of a run.

    A problem counts only if it has all of its `n` generations. Otherwise means and worst cases would mix different
    numbers of generations.

    Args:
        benchmarks (`Mapping[str, Benchmark]`): by name.
        sizes (`Mapping[str, int]`): number of problems of each benchmark, without `limit`.
        n (`int`): generations of each problem.
        store ([`GenerationStore`]): the stored generations.
        scores (`Sequence[Mapping]`): rows of `scoring.SCORES`.

    Returns:
        `dict[str, dict]`: by benchmark. A benchmark without a complete problem is missing.
    """
    problems: dict[str, dict[int, Any]] = defaultdict(dict)
    for row in store.problems():
        problems[row["benchmark"]][row["row"]] = stored_problem(row)
    lengths: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in store.generations(["tokens", "finish_reason"]):
        lengths[row["benchmark"]].append(row)
    by_problem: dict[str, dict[int, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for score in scores:
        by_problem[score["benchmark"]][score["row"]].append(score)
    results = {}
    for name, benchmark in benchmarks.items():
        complete = {row: entries for row, entries in by_problem[name].items() if len(entries) == n}
        if complete:
            results[name] = _benchmark_results(benchmark, problems[name], complete, n) | {
                "belonging": sizes[name],
                **_lengths(lengths[name]),
            }
    return results


def _benchmark_results(
    benchmark: Benchmark,
    problems: Mapping[int, Any],
    complete: Mapping[int, Sequence[Mapping[str, Any]]],
    n: int,
) -> dict[str, Any]:
    groups: dict[str, list[int]] = defaultdict(list)
    for row in sorted(complete):
        groups[benchmark.group_of(problems[row])].append(row)
    by_number = {row: sorted(entries, key=lambda entry: entry["generation"]) for row, entries in complete.items()}
    ordered = {row: [score["correct"] for score in entries] for row, entries in by_number.items()}
    generations = [
        [[_result(problems[row], by_number[row][generation]) for row in rows] for rows in groups.values()]
        for generation in range(n)
    ]
    repeated = repeated_metrics([[ordered[row] for row in rows] for rows in groups.values()])
    metrics = benchmark_metrics(generations, benchmark.aggregate)
    entries = [entry for of_problem in complete.values() for entry in of_problem]
    return {
        "title": benchmark.title,
        "headline": benchmark.headline,
        "scoring_note": benchmark.scoring_note,
        "problems": len(complete),
        "groups": len(groups),
        "n": n,
        "metrics": {name: _json(interval) for name, interval in metrics.items()},
        "repeated": {name: _json(interval) for name, interval in repeated.items()},
        "scorers": dict(sorted(Counter(entry["scorer"] for entry in entries).items())),
        "overruled": sum(entry["correct"] != entry["rules"] for entry in entries),
        "unparsed": sum(entry["extracted"] is None for entry in entries),
        "errors": sum(entry["error"] is not None for entry in entries),
    }


def _result(problem: Problem, score: Mapping[str, Any]) -> Result:
    return Result(problem.id, score["correct"], problem.fields, json.loads(score["rewards"]))


def _lengths(generations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "mean_tokens": sum(row["tokens"] for row in generations) / len(generations),
        "truncated": sum(row["finish_reason"] == "length" for row in generations) / len(generations),
    }


def _json(interval: Interval) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in asdict(interval).items()}
