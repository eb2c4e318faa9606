"""The study's report, written from its finished runs: tables, figures, and what they can and cannot tell."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from .analyses import write_analyses
from .config import Experiment, StudyConfig
from .figures import plot_accuracies, plot_curves, plot_differences, training_curves
from .markdown import markdown_table
from .results import StudyResults
from .statistics import (
    adjusted_p_values,
    interquartile_mean,
    mean_interval,
    paired_difference,
    probability_of_improvement,
)


SIGNIFICANCE = 0.05


def write_report(study: StudyConfig, results: StudyResults, path: str | Path, figures_dir: str | Path) -> None:
    """
    Write the report of a study.

    Args:
        study ([`StudyConfig`]): the study.
        results ([`StudyResults`]): its finished runs.
        path (`str` or `Path`): Markdown file to write.
        figures_dir (`str` or `Path`): folder for the figures, each with its data as CSV.
    """
    path, figures_dir = Path(path), Path(figures_dir)
    figures_dir.mkdir(parents=True, exist_ok=True)
    link = _relative(figures_dir, path.parent)
    parts = [f"# {study.name}\n", _how(study, results)]
    verdicts = []
    for name, experiment in study.experiments.items():
        if experiment.measure == "accuracy":
            text, found = _experiment(study, results, name, experiment, figures_dir, link)
            parts.append(text)
            verdicts += found
    parts.insert(1, _verdicts(study, verdicts, results))
    parts += write_analyses(study, results, figures_dir, link)
    parts += [_tuning(results), _environment(results)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts).rstrip() + "\n")
    results.runs.drop(
        columns=["reward_curve", "environment", "folder", "right_decisions_at_gate"], errors="ignore"
    ).to_csv(figures_dir / "runs.csv", index=False, float_format="%.6g")


def comparison_table(study: StudyConfig, results: StudyResults, task: str, arms: Sequence[str]) -> pd.DataFrame:
    """
    One row per arm with finished runs on a task: its accuracy, its paired difference to the baseline, its costs.

    Args:
        study ([`StudyConfig`]): the study.
        results ([`StudyResults`]): its finished runs.
        task (`str`): the task.
        arms (`Sequence[str]`): the arms.

    Returns:
        `pd.DataFrame`: numbers, not text; `p_adjusted` is for the number of arms in this table.
    """
    baseline = results.scores(task, study.baseline)
    rows = []
    for arm in arms:
        scores = results.scores(task, arm)
        if not scores:
            continue
        accuracy = mean_interval(list(scores.values()))
        row = {
            "arm": arm,
            "seeds": len(scores),
            "accuracy": accuracy.value,
            "low": accuracy.low,
            "high": accuracy.high,
        }
        greedy = results.scores(task, arm, "greedy_accuracy")
        row["greedy_accuracy"] = sum(greedy.values()) / len(greedy)
        row |= dict.fromkeys(("difference", "t_low", "t_high", "p_value"), math.nan)
        if arm != study.baseline and scores.keys() & baseline.keys():
            difference = paired_difference(scores, baseline)
            row |= {
                "difference": difference.interval.value,
                "t_low": difference.t_low,
                "t_high": difference.t_high,
                "p_value": difference.p_value,
            }
        for column in ("completions", "optimizer_steps", "trained_tokens", "sampled_tokens", "seconds"):
            costs = results.scores(task, arm, column)
            row[column] = sum(costs.values()) / len(costs)
        rows.append(row)
    table = pd.DataFrame(rows)
    if not table.empty:
        table["p_adjusted"] = adjusted_p_values(table["p_value"])
    return table


def verdict(row: pd.Series) -> str:
    """What a row of [`comparison_table`] says about its arm: `"better"`, `"worse"`, `"not told apart"` or `""`."""
    if math.isnan(row["difference"]):
        return ""
    if math.isnan(row["p_adjusted"]):
        return "one seed"
    if row["p_adjusted"] >= SIGNIFICANCE:
        return "not told apart"
    return "better" if row["difference"] > 0 else "worse"


def _how(study: StudyConfig, results: StudyResults) -> str:
    budget = study.budget
    critic = study.settings.get("critic_learning_rate")
    finished = len(results.runs)
    missing = f"; {len(results.missing)} are missing" if results.missing else ""
    lines = [
        "## How it was measured\n",
        f"- Every run: {budget.rollouts} rollouts of {budget.responses} responses, {budget.mini_batches} optimizer "
        f"steps each, from the same warm-started policy; then {budget.test_problems} test problems, sampled at "
        "temperature 1 and decoded greedily. No test problem was used to choose anything.",
        f"- Tuning: the learning rate, {len(study.tuning.learning_rate)} values "
        f"({', '.join(f'{rate:g}' for rate in study.tuning.learning_rate)}), "
        f"{len(study.tuning.seeds)} seed(s) each, on task `{study.tuning.task}` and a split of its own; the same for "
        "every arm that is tuned. Variants of an algorithm take its learning rate."
        + (f" A learned critic's learning rate is {critic:g} in all arms." if critic else ""),
        f"- {finished} runs are compared{missing}; every run that finished is in the tables and in `runs.csv`.",
        "- *Difference*: mean over seeds of the accuracy minus that of "
        f"`{study.baseline}` from the same seed, with Student's 95 % interval; `p`: paired t-test, adjusted for the "
        f"number of arms in its table (Benjamini–Hochberg). *Better* or *worse* is p < {SIGNIFICANCE}; all else is "
        "*not told apart*, which is not the same as equal. Brackets behind a mean are bootstrap intervals over "
        "seeds, too narrow for so few of them.",
        "- *Sampled tokens* are those of the responses and of all continuations; *seconds* are wall time on one core "
        "beside another run.\n",
    ]
    return "\n".join(lines)


def _experiment(
    study: StudyConfig, results: StudyResults, name: str, experiment: Experiment, figures_dir: Path, link: str
) -> tuple[str, list[tuple[str, str, pd.Series]]]:
    lines, found = [f"## {name.replace('_', ' ').capitalize()}\n"], []
    if experiment.question:
        lines.append(f"{experiment.question}\n")
    for task in experiment.tasks:
        table = comparison_table(study, results, task, experiment.arms)
        if table.empty:
            lines.append(f"No run on `{task}` is finished.\n")
            continue
        table = table.sort_values("accuracy", ascending=False, ignore_index=True)
        found += [(name, task, row) for _, row in table.iterrows()]
        if len(experiment.tasks) > 1:
            lines.append(f"### {task}\n")
        lines.append(_comparison(table, study.baseline))
        stem = f"{name}_{task}"
        plot_accuracies(figures_dir / f"{stem}.png", results, task, list(table["arm"]), f"{name}, {task}")
        lines.append(f"\n![Accuracy of every run]({link}/{stem}.png)\n")
    if len(experiment.tasks) == 1 and len(experiment.arms) > 2:
        lines += _curves(results, experiment, name, figures_dir, link)
    if len(experiment.tasks) > 1:
        lines += _across_tasks(study, results, name, experiment, figures_dir, link)
    return "\n".join(lines), found


def _curves(results: StudyResults, experiment: Experiment, name: str, figures_dir: Path, link: str) -> list[str]:
    lines, task = [], experiment.tasks[0]
    for x, label in (("completions", "responses trained on"), ("seconds", "seconds (one core)")):
        curves = training_curves(results, task, experiment.arms, {"reward": "accuracy of rollouts"}, x)
        plot_curves(figures_dir / f"{name}_over_{x}.png", curves, x, label, experiment.arms, f"{name}, {task}")
        lines.append(f"![Accuracy over {label}]({link}/{name}_over_{x}.png)\n")
    return lines


def _across_tasks(
    study: StudyConfig, results: StudyResults, name: str, experiment: Experiment, figures_dir: Path, link: str
) -> list[str]:
    gates = [study.tasks[task].gates for task in experiment.tasks]
    arms = [arm for arm in experiment.arms if arm != study.baseline]
    lines = []
    if len(set(gates)) == len(gates):
        plot_differences(
            figures_dir / f"{name}_differences.png",
            results,
            experiment.tasks,
            arms,
            study.baseline,
            gates,
            "length of the chain (decisions)",
        )
        lines.append(f"![Differences over the length of the chain]({link}/{name}_differences.png)\n")
    rows = []
    for arm in experiment.arms:
        scores = {task: list(results.scores(task, arm).values()) for task in experiment.tasks}
        if not all(scores.values()) or len({len(row) for row in scores.values()}) > 1:
            continue  # an unfinished arm has no mean over tasks
        middle = interquartile_mean(scores)
        row = {"arm": f"`{arm}`", "interquartile mean": f"{_number(middle.value)} {_bracket(middle.low, middle.high)}"}
        reference = {task: list(results.scores(task, study.baseline).values()) for task in experiment.tasks}
        if arm != study.baseline and all(reference.values()):
            wins = probability_of_improvement(scores, reference)
            row[f"P(beats `{study.baseline}`)"] = f"{wins.value:.2f} {_bracket(wins.low, wins.high)}"
        rows.append(row)
    if rows:
        lines += [
            "Over all these tasks (https://huggingface.co/papers/2108.13264):\n",
            markdown_table(pd.DataFrame(rows)),
            "",
        ]
    return lines


def _verdicts(study: StudyConfig, found: list[tuple[str, str, pd.Series]], results: StudyResults) -> str:
    lines = ["## What held, what did not, what could not be told\n"]
    if results.missing:
        lines.append(f"**This study is not finished: {len(results.missing)} runs are missing.**\n")
    groups = {
        "better": f"Better than `{study.baseline}`",
        "worse": f"Worse than `{study.baseline}`",
        "not told apart": f"Not told apart from `{study.baseline}`",
    }
    for kind, title in groups.items():
        # Experiments may share runs: each pair of arm and task once, as in the experiment that comes first.
        entries = {}
        for _, task, row in found:
            if verdict(row) == kind:
                text = f"`{row['arm']}` on {task} ({row['difference']:+.3f}, p = {row['p_adjusted']:.2g})"
                entries.setdefault((row["arm"], task), text)
        lines.append(f"- **{title}**: {'; '.join(entries.values()) or 'none'}.")
    return "\n".join(lines) + "\n"


def _tuning(results: StudyResults) -> str:
    table = results.tuning.groupby(["arm", "learning_rate"])["accuracy"].mean().unstack()
    table.columns = [f"{rate:g}" for rate in table.columns]
    table = table.map(_number)
    table.insert(0, "chosen", [f"{results.learning_rates[arm]:g}" for arm in table.index])
    table = table.reset_index().rename(columns={"arm": "arm"})
    table["arm"] = [f"`{arm}`" for arm in table["arm"]]
    hours = results.tuning["seconds"].sum() / 3600
    return "\n".join(
        [
            "## Tuning\n",
            f"Mean accuracy on the tuning split; {len(results.tuning)} runs, {hours:.1f} core hours.\n",
            markdown_table(table),
            "",
        ]
    )


def _environment(results: StudyResults) -> str:
    environments = pd.DataFrame(list(results.runs["environment"]))
    lines = ["## Computed with\n"]
    for name in environments.columns:
        values = environments[name].astype(str).unique()
        lines.append(f"- {name}: {', '.join(values)}")
    hours = results.runs["seconds"].sum() / 3600
    lines.append(f"- core hours of the compared runs: {hours:.1f}")
    return "\n".join(lines) + "\n"


def _comparison(table: pd.DataFrame, baseline: str) -> str:
    rows = []
    for _, row in table.iterrows():
        difference = ""
        if not math.isnan(row["difference"]):
            difference = f"{row['difference']:+.3f}"
            if not math.isnan(row["t_low"]):
                difference += f" {_bracket(row['t_low'], row['t_high'], signed=True)}"
        rows.append(
            {
                "arm": f"**`{row['arm']}`**" if row["arm"] == baseline else f"`{row['arm']}`",
                "seeds": row["seeds"],
                "accuracy": f"{_number(row['accuracy'])} {_bracket(row['low'], row['high'])}",
                "greedy": _number(row["greedy_accuracy"]),
                "difference": difference,
                "p": "" if math.isnan(row["p_adjusted"]) else f"{row['p_adjusted']:.2g}",
                "verdict": verdict(row),
                "responses": f"{row['completions']:,.0f}",
                "steps": f"{row['optimizer_steps']:,.0f}",
                "trained tokens": f"{row['trained_tokens']:,.0f}",
                "sampled tokens": f"{row['sampled_tokens']:,.0f}",
                "seconds": f"{row['seconds']:.0f}",
            }
        )
    return markdown_table(pd.DataFrame(rows))


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _bracket(low: float, high: float, signed: bool = False) -> str:
    return f"[{low:+.3f}, {high:+.3f}]" if signed else f"[{low:.3f}, {high:.3f}]"


def _relative(folder: Path, start: Path) -> str:
    return Path(os.path.relpath(folder, start)).as_posix()
