"""The study's report on its finished runs: tables, figures, and their limits."""

from __future__ import annotations

import math
import os
from itertools import groupby
from pathlib import Path

import pandas as pd

from ..files import write_text
from ..foreign_text import escape_markdown
from ..names import markdown_table
from .analyses import write_analyses
from .comparisons import SIGNIFICANCE, Comparison, comparisons, verdict
from .config import StudyConfig
from .figures import MOST_BANDS, plot_accuracies, plot_axis, plot_curves, plot_differences, training_curves
from .qualification import write_qualification
from .results import StudyResults
from .statistics import interquartile_mean, probability_of_improvement


CHAIN_LENGTH = "length of the chain (decisions)"


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
    path.parent.mkdir(parents=True, exist_ok=True)
    figures_dir.mkdir(parents=True, exist_ok=True)
    link = Path(os.path.relpath(figures_dir, path.parent)).as_posix()
    found = comparisons(study, results)
    parts = [f"# {study.name}\n", _verdicts(study, found, results), write_qualification(study, results)]
    parts.append(_how(study, results))
    for name, group in groupby(found, key=lambda comparison: comparison.name):
        parts.append(_experiment(study, results, name, list(group), figures_dir, link))
    parts += write_analyses(study, results, figures_dir, link)
    parts += [_tuning(study, results), _environment(results)]
    write_text(path, "\n".join(part for part in parts if part).rstrip() + "\n")
    for name, table in (("runs", results.runs), ("tuning", results.tuning)):
        numbers = [column for column in table.columns if not table[column].map(_is_nested).any()]
        table[numbers].drop(columns="folder", errors="ignore").to_csv(figures_dir / f"{name}.csv", index=False)


def _verdicts(study: StudyConfig, found: list[Comparison], results: StudyResults) -> str:
    lines = ["## Verdicts\n"]
    if results.missing:
        lines.append(f"**This study is not finished: {len(results.missing)} runs are missing.**\n")
    groups = {
        "better": f"Better than `{study.baseline}`",
        "worse": f"Worse than `{study.baseline}`",
        "not significant": f"Not significantly different from `{study.baseline}`",
        "not tested": "Not tested, because there are too few seeds",
    }
    for kind, title in groups.items():
        entries = {}  # experiments may share runs: each comparison once
        for comparison in found:
            for _, row in comparison.table.iterrows():
                if verdict(row) == kind:
                    p = "" if math.isnan(row["p_adjusted"]) else f", p = {row['p_adjusted']:.2g}"
                    text = f"`{row['arm']}` on {comparison.task} ({row['difference']:+.3f}{p})"
                    entries.setdefault((row["arm"], comparison.task), text)
        if entries or kind != "not tested":
            lines.append(f"- **{title}**: {'; '.join(entries.values()) or 'none'}.")
    failed = results.runs[results.runs["failed"].notna()]
    if not failed.empty:
        names = ", ".join(f"`{run['arm']}` (seed {run['seed']}, {run['task']})" for _, run in failed.iterrows())
        lines.append(f"- **Diverged**, counted as accuracy 0: {names}.")
    return "\n".join(lines) + "\n"


def _how(study: StudyConfig, results: StudyResults) -> str:
    budget, rates = study.budget, study.tuning.learning_rate
    critic = study.settings.get("critic_learning_rate")
    multiples = [f"`{name}` has {arm.samples} times as many" for name, arm in study.arms.items() if arm.samples > 1]
    missing = f"; {len(results.missing)} are missing" if results.missing else ""
    lines = [
        "## How it was measured\n",
        f"- Each run has {budget.rollouts} rollouts of {budget.responses} responses"
        + (f" ({', '.join(multiples)})" if multiples else "")
        + f", with {budget.mini_batches} optimizer steps per rollout. The final policy solves {budget.test_problems} "
        "test problems, once sampled at temperature 1 and once decoded greedily. No test problem was used to choose "
        "any setting.",
        f"- The learning rate was tuned over {len(rates)} values ({', '.join(f'{rate:g}' for rate in rates)}) with "
        f"{len(study.tuning.seeds)} seed(s) each, on a separate split of `{study.tuning.task}`, in the same way for "
        "every tuned arm. A variant of an algorithm takes the algorithm's learning rate."
        + (f" A learned critic's learning rate is {critic:g} everywhere and was not tuned." if critic else ""),
        f"- {len(results.runs)} runs are compared{missing}. All finished runs are in the tables and in `runs.csv`. "
        "Tuning runs are in `tuning.csv`.",
        "- All runs of a task start from the same warm-started policy and are measured on the same test problems. The "
        "intervals therefore describe the randomness of reinforcement learning, not the variation between policies or "
        "problems. Runs with the same seed see the same problems in the same order. Algorithms with groups see fewer "
        "problems, in another order.",
        f"- *Difference* is the accuracy minus the accuracy of `{study.baseline}` with the same seed, averaged over "
        "seeds, with Student's 95 % interval. `p` comes from a paired t-test and is adjusted for all comparisons of "
        f"the study (Benjamini–Hochberg). *Better* and *worse* mean p < {SIGNIFICANCE}. *Not significant* does not "
        "mean equal. Brackets after a mean are bootstrap intervals over seeds, which are too narrow for so few seeds. "
        f"The bands of curves are too narrow, too; figures with more than {MOST_BANDS} arms have no bands.",
        "- *Rollout tokens* are the tokens of all rollouts. *Sampled tokens* also include all continuations. *CPU "
        "seconds* are the training time on one core, without evaluation and analyses.\n",
    ]
    return "\n".join(lines)


def _experiment(
    study: StudyConfig, results: StudyResults, name: str, found: list[Comparison], figures_dir: Path, link: str
) -> str:
    experiment = found[0].experiment
    lines = [f"## {name.replace('_', ' ').capitalize()}\n"]
    if experiment.question:
        lines.append(f"{experiment.question.strip()}\n")
    for comparison in found:
        task, arms = comparison.task, list(comparison.table["arm"])
        if len(experiment.tasks) > 1:
            lines.append(f"### {task}\n")
        lines.append(_table(comparison.table, study.baseline))
        stem = f"{name}_{task}"
        runs = results.runs_of(task, arms, experiment.seeds)
        plot_accuracies(figures_dir / f"{stem}.png", runs, arms, f"{name}, {task}")
        lines.append(f"\n![Accuracy of every run]({link}/{stem}.png)\n")
        on_axis = runs[runs["arm"].isin(experiment.axis)]
        if not on_axis.empty:
            label = experiment.axis_label or "number that varies between the arms"
            on_axis = on_axis[["arm", "seed", "accuracy"]].assign(**{label: on_axis["arm"].map(experiment.axis)})
            plot_axis(figures_dir / f"{stem}_axis.png", on_axis, label)
            lines.append(f"![Accuracy over the {label}]({link}/{stem}_axis.png)\n")
    if len(experiment.tasks) == 1 and len(found[0].table) > 1:
        lines += _curves(results, found[0], figures_dir, link)
    if len(found) > 1:
        lines += _across_tasks(study, results, found, figures_dir, link)
    return "\n".join(lines)


def _table(table: pd.DataFrame, baseline: str) -> str:
    rows = []
    for _, row in table.iterrows():
        difference = ""
        if not math.isnan(row["difference"]):
            difference = f"{row['difference']:+.3f}"
            if not math.isnan(row["t_low"]):
                difference += f" [{row['t_low']:+.3f}, {row['t_high']:+.3f}]"
        rows.append(
            {
                "arm": f"**`{row['arm']}`**" if row["arm"] == baseline else f"`{row['arm']}`",
                "seeds": row["seeds"],
                "accuracy": f"{row['accuracy']:.3f} {_bracket(row['low'], row['high'])}",
                "greedy": f"{row['greedy_accuracy']:.3f}",
                "difference": difference,
                "p": "" if math.isnan(row["p_adjusted"]) else f"{row['p_adjusted']:.2g}",
                "verdict": verdict(row),
                "responses": f"{row['completions']:,.0f}",
                "steps": f"{row['optimizer_steps']:,.0f}",
                "rollout tokens": f"{row['rollout_tokens']:,.0f}",
                "sampled tokens": f"{row['sampled_tokens']:,.0f}",
                "CPU seconds": f"{row['cpu_seconds']:.0f}",
            }
        )
    return markdown_table(pd.DataFrame(rows))


def _curves(results: StudyResults, comparison: Comparison, figures_dir: Path, link: str) -> list[str]:
    lines, experiment, task = [], comparison.experiment, comparison.task
    arms = [arm for arm in experiment.arms if arm in set(comparison.table["arm"])]
    for x, label in (("completions", "responses trained on"), ("cpu_seconds", "CPU seconds (one core)")):
        curves = training_curves(results, task, arms, experiment.seeds, {"reward": "accuracy of rollouts"}, x)
        stem = f"{comparison.name}_over_{x}"
        plot_curves(figures_dir / f"{stem}.png", curves, x, label, arms, f"{comparison.name}, {task}")
        lines.append(f"![Accuracy over {label}]({link}/{stem}.png)\n")
    return lines


def _across_tasks(
    study: StudyConfig, results: StudyResults, found: list[Comparison], figures_dir: Path, link: str
) -> list[str]:
    experiment, name, lines = found[0].experiment, found[0].name, []
    compared = pd.concat(
        [c.table.assign(task=c.task, **{CHAIN_LENGTH: study.tasks[c.task].gates}) for c in found], ignore_index=True
    ).dropna(subset=["difference"])
    if not compared.empty and compared.groupby("arm")[CHAIN_LENGTH].nunique().max() == len(found):
        data = compared[["arm", "task", CHAIN_LENGTH, "difference", "t_low", "t_high"]]
        plot_differences(figures_dir / f"{name}_differences.png", data, CHAIN_LENGTH, study.baseline)
        lines.append(f"![Differences over the {CHAIN_LENGTH}]({link}/{name}_differences.png)\n")
    rows = []
    reference = _scores(results, experiment.tasks, study.baseline, experiment.seeds)
    for arm in experiment.arms:
        scores = _scores(results, experiment.tasks, arm, experiment.seeds)
        if scores is None:
            continue
        middle = interquartile_mean(scores)
        row = {"arm": f"`{arm}`", "interquartile mean": f"{middle.value:.3f} {_bracket(middle.low, middle.high)}"}
        if arm != study.baseline and reference is not None:
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


def _scores(results: StudyResults, tasks: list[str], arm: str, seeds: list[int]) -> dict[str, list[float]] | None:
    """Scores of an arm on every task; `None` while some are missing, because a mean over tasks needs all tasks."""
    scores = {task: list(results.scores(task, arm, seeds).values()) for task in tasks}
    return scores if all(len(row) == len(seeds) for row in scores.values()) else None


def _tuning(study: StudyConfig, results: StudyResults) -> str:
    table = results.tuning.groupby(["arm", "learning_rate"])["accuracy"].mean().unstack()
    ends = (min(study.tuning.learning_rate), max(study.tuning.learning_rate))
    rows = []
    for arm, accuracies in table.iterrows():
        rate = results.learning_rates[arm]
        row = {"arm": f"`{arm}`", "chosen": f"{rate:g}" + (" (end of the grid)" if rate in ends else "")}
        rows.append(row | {f"{rate:g}": f"{accuracy:.3f}" for rate, accuracy in accuracies.items()})
    hours = results.tuning["seconds"].sum() / 3600
    return (
        f"## Tuning\n\nMean accuracy on the tuning split, from {len(results.tuning)} runs of {hours:.1f} hours in "
        "total.\n\n"
        f"{markdown_table(pd.DataFrame(rows))}\n"
    )


def _environment(results: StudyResults) -> str:
    environments = pd.DataFrame(list(results.runs["environment"]))
    lines = ["## Computed with\n"]
    mixed = []
    for name in environments.columns:
        values = sorted(environments[name].astype(object).fillna("unknown").astype(str).unique())
        lines.append(f"- {escape_markdown(str(name))}: {escape_markdown(', '.join(values))}")
        mixed += [name] if len(values) > 1 else []
    if mixed:
        lines.append(f"\n**The runs differ in: {', '.join(mixed)}.**\n")
    hours = results.runs["seconds"].sum() / 3600
    lines.append(f"- hours of compared runs, with their evaluation and recordings: {hours:.1f}")
    return "\n".join(lines) + "\n"


def _bracket(low: float, high: float) -> str:
    return f"[{low:.3f}, {high:.3f}]"


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list)
