"""What a benchmark is: its rows, how one becomes a problem, how answers score, and what scores add up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Problem:
    """One question, as a model is asked it and as a scorer reads it."""

    id: str
    """Unique within the benchmark, and the same each time the rows are read."""
    prompt: list[dict[str, Any]]
    """Messages as TRL and chat templates have them, `{"type": "image"}` blocks where the images belong."""
    answer: str
    """The right answer, as the scorer reads it."""
    images: list[Image.Image] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    """What scoring, grouping and tables need beside the answer (choices, variant, topic, ...); JSON values only."""


@dataclass(frozen=True)
class Score:
    """What a scorer found in one generation."""

    correct: float
    """From 0.0 to 1.0; 0.0 and 1.0 alone where a benchmark gives no part marks."""
    extracted: str | None
    """The answer that was read off the generation, `None` if there is none."""


@dataclass(frozen=True)
class Result:
    """A problem's score without its prompt: what aggregation reads."""

    id: str
    correct: float
    fields: Mapping[str, Any]


Aggregate = Callable[[Sequence[Sequence[Result]]], dict[str, float]]
"""
From groups of results, one generation of each problem, to metrics from 0.0 to 1.0 by name.

A group is what belongs together (the variants of one question); a group may occur several times, as it does when
groups are drawn for a bootstrap interval, so an aggregate never puts results together by anything but their group.
"""


def mean_accuracy(groups: Sequence[Sequence[Result]]) -> dict[str, float]:
    """The mean of all results, as `accuracy`."""
    scores = [result.correct for group in groups for result in group]
    return {"accuracy": sum(scores) / len(scores)}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, as data and three functions."""

    name: str
    """As on the command line: `geo3k`."""
    title: str
    """As in tables: `Geo3K`."""
    dataset: str
    """Hub id of its rows; a local path with the same columns may be read instead."""
    split: str
    to_problem: Callable[[Mapping[str, Any], int], Problem]
    """From a row and its number. Pictures in a row are files: [`~sapo_trl.evaluation.benchmarks.rows.to_image`]."""
    score: Callable[[Problem, str], Score]
    """From a problem and the text of a generation. Rules only: no model, no network."""
    config: str | None = None
    """Configuration of the data set on the hub."""
    aggregate: Aggregate = mean_accuracy
    headline: str = "accuracy"
    """The metric of `aggregate` that stands in tables."""
    group_of: Callable[[Problem], str] = lambda problem: problem.id
    keep: Callable[[Mapping[str, Any]], bool] = lambda row: True
    """Whether a row belongs to the benchmark, where a split holds more (text-only rows, other settings)."""
    right_answer: Callable[[Problem], str] = lambda problem: problem.answer
    """What a right response has in its box. Each row is tried with it before anything is generated."""
    scoring_note: str = ""
    """How the rules differ from the benchmark's own scorer, for the docs and below tables."""
