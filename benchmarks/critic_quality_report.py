"""The results of `critic_quality.py`: their file, the chosen learning rates, the table and the picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from critic_lessons import LEARNED, TASKS

from sapo_trl.plots import new_figure
from sapo_trl.study.statistics import blocked_contrast


PASSES = 2
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4, 5)
BASELINE = "separate"
CRITICS = {
    "ladder": '`"ladder"`',
    "separate": '`"separate"`',
    "adapter": '`"adapter"`',
    "shared:reads=3": '`"shared"`, three states',
    "shared": '`"shared"`, last state',
}
"""A mode and sizes, as [`SegmentValueHead.from_policy`] takes them, and a name for the table."""


class Results:
    """The file of results: one line for each run."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def of(self, **wanted: Any) -> list[dict[str, Any]]:
        return [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]

    def add(self, measure: Callable[[], dict[str, Any]], **what: Any) -> None:
        """Measure and write, unless the file has it."""
        if not self.of(**what):
            self.rows.append({**what, **measure()})
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
            print(json.dumps(self.rows[-1]), flush=True)

    def tuned(self, task: str, critic: str) -> list[float]:
        """The learning rate of a critic for one pass, for two passes, …"""
        found = self.of(task=task, responses=LEARNED, critic=critic)
        means = {
            rate: np.mean(
                [
                    [test["explained_variance"] for test in row["measured"]]
                    for row in found
                    if row["learning_rate"] == rate and row["seed"] in TUNING_SEEDS
                ],
                axis=0,
            )
            for rate in LEARNING_RATES
        }
        return [max(LEARNING_RATES, key=lambda rate: np.nan_to_num(means[rate][i], nan=-9)) for i in range(PASSES)]

    def compared(self, task: str, critic: str, passes: int, measure: str) -> dict[int, float]:
        """A measure of each seed, at the critic's learning rate."""
        rate = self.tuned(task, critic)[passes - 1]
        return {
            row["seed"]: row["measured"][passes - 1][measure]
            for row in self.of(task=task, responses=LEARNED, critic=critic, learning_rate=rate)
            if row["seed"] in SEEDS and len(row["measured"]) >= passes
        }


def as_markdown(results: Results) -> str:
    """A table of each task, with Student's 95 % intervals over seeds."""
    parts = []
    for task, (title, *_) in TASKS.items():
        critics = compared_critics(results, task)
        if not critics:
            continue
        lines = [
            f"**{title}**",
            "",
            f"| Critic | parameters | passes | rate | explained variance | minus `{BASELINE}` | squared error "
            f"(thousandths) | minus `{BASELINE}` |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for critic in critics:
            for passes in range(1, PASSES + 1):
                cells = []
                for measure, scale in (("explained_variance", 1), ("squared_error", 1000)):
                    own, other = (results.compared(task, name, passes, measure) for name in (critic, BASELINE))
                    cells.append(_cell(own, None, scale))
                    cells.append(_cell(own, other, scale) if critic != BASELINE else "")
                name, size = (
                    ("", "") if passes > 1 else (CRITICS.get(critic, critic), _parameters(results, task, critic))
                )
                rate = results.tuned(task, critic)[passes - 1]
                lines.append(f"| {name} | {size} | {passes} | {rate:g} | {' | '.join(cells)} |")
        limit = {measure: _limit(results, task, measure) for measure in ("explained_variance", "squared_error")}
        lines += [
            f"| true values | | | | {_cell(limit['explained_variance'])} | | 0 | |",
            f"| best constant | | | | 0 | | {_cell(limit['squared_error'], None, 1000)} | |",
        ]
        accuracy = np.mean(list(_limit(results, task, "accuracy").values()))
        lines += ["", f"{len(SEEDS)} seeds; the policy is right in {accuracy:.1%} of its responses.", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def compared_critics(results: Results, task: str) -> list[str]:
    """The critics with a result on every reported seed."""
    found = [name for name in CRITICS if results.of(task=task, critic=name, seed=TUNING_SEEDS[-1])]
    return [name for name in found if len(results.compared(task, name, PASSES, "explained_variance")) == len(SEEDS)]


def _limit(results: Results, task: str, measure: str) -> dict[int, float]:
    return {row["seed"]: row[measure] for row in results.of(task=task, limit=True)}


def _parameters(results: Results, task: str, critic: str) -> str:
    return f"{results.of(task=task, critic=critic)[0]['parameters']:,}"


def _cell(scores: dict[int, float], others: dict[int, float] | None = None, scale: float = 1.0) -> str:
    mean, low, high = interval(scores, others)
    digits = 3 if scale == 1 else 1
    return f"{scale * mean:.{digits}f} ({scale * low:.{digits}f} to {scale * high:.{digits}f})"


def interval(scores: dict[int, float], others: dict[int, float] | None = None) -> tuple[float, float, float]:
    """The mean over seeds, or the mean paired difference, with Student's 95 % interval."""
    # Pairs are right here: critics of a seed learn from the same responses.
    others = dict.fromkeys(scores, 0.0) if others is None else others
    differences = [score - others[seed] for seed, score in scores.items() if seed in others]
    if len(differences) < 2:
        return float(np.mean(differences)), np.nan, np.nan
    found = blocked_contrast([(1.0, {0: differences})]).interval
    return found.value, found.low, found.high


def draw(path: Path, results: Results) -> None:
    """Both measures of each critic on each task: after one pass a hollow mark, after two a full one."""
    tasks = [task for task in TASKS if compared_critics(results, task)]
    measures = {"explained_variance": "explained variance", "squared_error": "squared error"}
    figure = new_figure(4.8 * len(tasks), 5.2)
    for column, task in enumerate(tasks):
        critics = compared_critics(results, task)
        for row, (measure, label) in enumerate(measures.items()):
            axes = figure.add_subplot(len(measures), len(tasks), row * len(tasks) + column + 1)
            limit = np.mean(list(_limit(results, task, measure).values()))
            axes.axvline(limit, color="black", linestyle="--", linewidth=1)
            if row == 0:
                axes.axvline(0, color="black", linewidth=0.6)
            for place, critic in enumerate(critics):
                for passes, shift, style in ((1, -0.16, "white"), (2, 0.16, "black")):
                    mean, low, high = interval(results.compared(task, critic, passes, measure))
                    axes.errorbar(
                        mean,
                        place + shift,
                        xerr=[[mean - low], [high - mean]],
                        color="black",
                        marker="o",
                        markerfacecolor=style,
                        markersize=5,
                        linewidth=1,
                        capsize=2,
                        linestyle="none",
                        label=("one pass", "two passes")[passes - 1] if place == row == column == 0 else None,
                    )
            axes.set_yticks(
                range(len(critics)), [CRITICS[critic].replace("`", "").replace('"', "") for critic in critics]
            )
            axes.set_ylim(len(critics) - 0.4, -0.9)
            side = "right" if limit > np.mean(axes.get_xlim()) else "left"  # where there is more room
            axes.text(limit, -0.62, (" true values ", " best constant ")[row], ha=side, va="center", fontsize=8)
            axes.set_xlabel(f"{label} ({('larger', 'smaller')[row]} is better)")
            axes.grid(axis="x", alpha=0.3)
            if row == 0:
                axes.set_title(TASKS[task].title.replace("`", ""))
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)
