"""A benchmark: its rows, and functions that turn a row into a problem, score an answer and add up scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from PIL import Image


TASK = "task"
"""Name of the benchmark that a run file of `sapo-trl train` describes."""


@dataclass(frozen=True)
class Problem:
    """One question, with its prompt for the model and its answer for the scorer."""

    id: str
    """Unique within the benchmark, and the same each time the rows are read."""
    prompt: list[dict[str, Any]] | str
    """
    Messages in the form of TRL and chat templates, with an `{"type": "image"}` block for each image; or a plain text,
    which the model continues without a chat template.
    """
    answer: str
    """The right answer, in the scorer's form."""
    images: list[Image.Image] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    """Further values for scoring, grouping and tables (choices, variant, topic, ...); JSON values only."""


@dataclass(frozen=True)
class Score:
    """The score of one generation."""

    correct: float
    """From 0.0 to 1.0. Only 0.0 or 1.0 if the benchmark gives no partial marks."""
    extracted: str | None
    """The answer extracted from the generation; `None` if there is none."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Rewards by name, for a task with reward functions."""


@dataclass(frozen=True)
class Result:
    """A problem's score without its prompt, for aggregation."""

    id: str
    correct: float
    fields: Mapping[str, Any]
    rewards: Mapping[str, float] = field(default_factory=dict)


Aggregate = Callable[[Sequence[Sequence[Result]]], dict[str, float]]
"""
A function from groups of results, with one generation of each problem, to metrics from 0.0 to 1.0 by name.

A group holds results that belong together, such as the variants of one question. A group may occur several times,
because a bootstrap interval draws groups. So an aggregate must combine results only by their group.
"""


def mean_accuracy(groups: Sequence[Sequence[Result]]) -> dict[str, float]:
    """The mean over all results, as `accuracy`."""
    scores = [result.correct for group in groups for result in group]
    return {"accuracy": sum(scores) / len(scores)}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, as data and three functions."""

    name: str
    """Name on the command line: `geo3k`."""
    title: str
    """Title in tables: `Geo3K`."""
    dataset: str
    """Hub id of its rows. A local path with the same columns can be read instead."""
    split: str
    to_problem: Callable[[Mapping[str, Any], int], Problem]
    """
    Takes a row and its number. Pictures in the row are files:
    [`~sapo_trl.evaluation.benchmarks.rows.to_image`] reads them.
    """
    score: Callable[[Problem, str], Score]
    """Takes a problem and the text of a generation. It uses only rules: no model, no network."""
    config: str | None = None
    """Configuration of the data set on the hub."""
    aggregate: Aggregate = mean_accuracy
    headline: str = "accuracy"
    """The metric of `aggregate` for tables."""
    group_of: Callable[[Problem], str] = lambda problem: problem.id
    keep: Callable[[Mapping[str, Any]], bool] = lambda row: True
    """Whether a row belongs to the benchmark. A split may have other rows, too (text-only rows, other settings)."""
    right_answer: Callable[[Problem], str] | None = lambda problem: problem.answer
    """
    The content of a right response's box. Each row is tried with it before anything is generated. `None` if it is not
    known which response is right.
    """
    load: Callable[[], Dataset] | None = None
    """Reads the rows in place of `dataset` and `split`."""
    scoring_note: str = ""
    """Differences between the rules and the benchmark's own scorer, for the docs and below tables."""
