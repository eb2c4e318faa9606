"""The study's report on its finished runs: verdicts on the tests that were named before, then tables and figures."""

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
from .comparisons import Comparison, comparisons
from .config import StudyConfig
from .credit_figure import agreement, credit_tables, deciding_share, plot_credit
from .figures import groups_of, plot_axis, plot_curves, plot_effects, plot_runs, training_curves
from .preregistration import changed_tests
from .recordings import collect, write_recordings
from .results import COMPLETE, StudyResults
from .verdicts import verdict_table, verdicts


def write_report(study: StudyConfig, results: StudyResults, path: str | Path, figures_dir: str | Path) -> None:
    """
    Write the report of a study.

    Args:
        study ([`StudyConfig`]): the study.
        results ([`StudyResults`]): its finished runs.
        path (`str` or `Path`): Markdown file to write.
        figures_dir (`str` or `Path`):
            folder for the figures, each with its data as CSV, for all runs (`runs.csv`, `tuning.csv`) and for the
            recordings (`responses.parquet`, `values.parquet`, `logs.parquet`).
    """
    path, figures_dir = Path(path), Path(figures_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    figures_dir.mkdir(parents=True, exist_ok=True)
    link = Path(os.path.relpath(figures_dir, path.parent)).as_posix()
    recordings = collect(results)
    write_recordings(recordings, figures_dir)
    parts = [f"# {study.name}\n", _verdicts(study, results, figures_dir, link), _how(study, results)]
    for name, group in groupby(comparisons(study, results), key=lambda comparison: comparison.name):
        parts.append(_experiment(study, results, name, list(group), figures_dir, link))
    parts += write_analyses(study, results, recordings, figures_dir, link)
    parts += [_tuning(study, results), _environment(results)]
    write_text(path, "\n".join(part for part in parts if part).rstrip() + "\n")
    for name, table in (("runs", results.runs), ("tuning", results.tuning)):
        numbers = [column for column in table.columns if not table[column].map(_is_nested).any()]
        table[numbers].drop(columns="folder", errors="ignore").to_csv(figures_dir / f"{name}.csv", index=False)


def _verdicts(study: StudyConfig, results: StudyResults, figures_dir: Path, link: str) -> str:
    lines = ["## Verdicts\n"]
    if results.missing:
        lines.append(f"**This study is not finished: {len(results.missing)} runs are missing.**\n")
    found = verdicts(study, results)
    if found:
        lines.append(markdown_table(verdict_table(found)) + "\n")
    else:
        lines.append("No test was named before the runs, so there is no verdict: everything below explores.\n")
    lines += [section for section in [_credit(study, results, figures_dir, link)] if section]
    if found:
        level = study.preregistered.level
        lines.append(
            f"A claim is *held* if its p-value, corrected by Holm's method for all {len(found)} tests, is below "
            f"{level:g} and the effect has the claimed sign. It is *not held* if the 95 % interval excludes every "
            "effect as large as `smallest`, which was named before the runs as well. Otherwise the study *cannot "
            "tell*. Runs are compared within worlds (policies with other warm starts and other meanings of signs). "
            "No run is paired with another. The intervals are about these worlds.\n"
        )
        drawn = [one for one in found if one.effect is not None]
        if drawn:
            plot_effects(figures_dir / "effects.png", drawn)
            lines.append(f"![Effects of the preregistered tests]({link}/effects.png)\n")
    changed = changed_tests(study, results.output_dir)
    if changed:
        names = ", ".join(f"`{name}`" for name in changed)
        lines.append(
            f"**Named or changed after the first run, so no verdict: {names}.** Their arms are in the tables below.\n"
        )
    failed = results.runs[results.runs["failed"].notna()]
    if not failed.empty:
        places = [f"`{run['arm']}` ({run['task']}, {run['world']}, {run['seed']})" for _, run in failed.iterrows()]
        lines.append(f"Diverged, counted as accuracy 0 (arm, task, world, seed): {', '.join(places)}.\n")
    return "\n".join(lines)


def _credit(study: StudyConfig, results: StudyResults, figures_dir: Path, link: str) -> str:
    experiment = next((e for e in study.experiments.values() if e.measure == "credit"), None)
    tables = credit_tables(results, experiment.arms) if experiment is not None else {}
    if not tables:
        return ""
    plot_credit(figures_dir / "credit.png", tables)
    first = next(iter(tables.values()))
    rows = [{"credit of": "exact", "on the chosen cells": f"{deciding_share(first, 'exact'):.2f}", "correlation": ""}]
    for arm, table in tables.items():
        correlation = agreement(table)
        row = {"credit of": f"`{arm}`", "on the chosen cells": f"{deciding_share(table, 'advantages'):.2f}"}
        rows.append(row | {"correlation": "" if math.isnan(correlation) else f"{correlation:.2f}"})
    return (
        f"![Where each algorithm puts its credit]({link}/credit.png)\n\nThe same {len(first)} responses of the "
        "warm-started policy, which does not change here; critics have learned from as many responses as in a run. "
        "The table has the share of the absolute advantages that lies on the tokens that name the chosen cells, and "
        f"the correlation with the exact advantages over all tokens.\n\n{markdown_table(pd.DataFrame(rows))}\n"
    )


def _how(study: StudyConfig, results: StudyResults) -> str:
    budget, rates = study.budget, study.tuning.learning_rate
    critic = study.settings.get("critic_learning_rate")
    multiples = [f"`{name}` has {arm.samples} times as many" for name, arm in study.arms.items() if arm.samples > 1]
    missing = f"; {len(results.missing)} are missing" if results.missing else ""
    worlds = len(study.tuning.worlds or [0])
    fixed = [f"`{name}` {arm.learning_rate:g}" for name, arm in study.arms.items() if arm.learning_rate is not None]
    own = [
        f"`{name}` ({', '.join(f'{setting}={value}' for setting, value in arm.settings.items())})"
        for name, arm in study.arms.items()
        if arm.settings
    ]
    lines = [
        "## How it was measured\n",
        f"- Each run has {budget.rollouts} rollouts of {budget.responses} responses"
        + (f" ({', '.join(multiples)})" if multiples else "")
        + f", with {budget.mini_batches} optimizer steps per rollout. The final policy solves {budget.test_problems} "
        "test problems, sampled at temperature 1. No tuning run sees these problems, nor a seed of the comparisons.",
        "- *Log-odds* are the log-odds of the right cell among the four cells, averaged over all decisions in the "
        "right solutions of the test problems. Nothing is sampled for them, so they show the knowledge of a policy "
        "even if it has lost the form of responses. A policy that diverged counts as one that guesses.",
        f"- A run has *lost its form* if fewer than {COMPLETE:.0%} of its responses have all steps.",
        f"- The learning rate was tuned over {len(rates)} values ({', '.join(f'{rate:g}' for rate in rates)}) with "
        f"{len(study.tuning.seeds) * worlds} runs each, on a separate split of `{study.tuning.task}`, in the same way "
        "for every tuned arm; the best mean accuracy decides. A variant of an algorithm takes the algorithm's choice."
        + (f" Fixed rates: {', '.join(fixed)}." if fixed else "")
        + (f" A learned critic's learning rate is {critic:g} everywhere and was not tuned." if critic else ""),
        *([f"- Arms with settings of their own: {'; '.join(own)}."] if own else []),
        f"- {len(results.runs)} runs are compared{missing}. All finished runs are in the tables and in `runs.csv`. "
        "Tuning runs are in `tuning.csv`. Recordings are in `responses.parquet` and `values.parquet`, all logs in "
        "`logs.parquet`.",
        "- Tables below the verdicts explore. They have intervals and no tests. Means of log-odds and differences "
        "have Student's 95 % intervals within worlds; medians of accuracies have distribution-free ones, with six "
        "runs or more.",
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
        task = comparison.task
        if len(experiment.tasks) > 1:
            lines.append(f"### {task}\n")
        lines.append(_table(comparison.table, study.baseline))
        stem = f"{name}_{task}"
        runs = results.runs_of(experiment, task)
        label = "log-odds of right decisions"
        plot_runs(figures_dir / f"{stem}.png", comparison, runs, "log_odds", label)
        lines.append(f"\n![Log-odds of every run]({link}/{stem}.png)\n")
        on_axis = runs[runs["arm"].isin(experiment.axis)]
        if not on_axis.empty:
            number = experiment.axis_label or "number that varies between the arms"
            shown = on_axis[["arm", "world", "seed", "log_odds"]]
            shown = shown.assign(**{number: on_axis["arm"].map(experiment.axis)})
            plot_axis(figures_dir / f"{stem}_axis.png", shown, number, "log_odds", label)
            lines.append(f"![Log-odds over the {number}]({link}/{stem}_axis.png)\n")
        arms = [arm for arm in experiment.arms if arm in set(comparison.table["arm"])]
        curves = training_curves(runs, {"reward": "accuracy of rollouts"})
        # Arms with other numbers of responses have equal steps.
        x = ("step", "optimizer steps") if runs["samples"].nunique() > 1 else ("completions", "responses trained on")
        plot_curves(figures_dir / f"{stem}_curves.png", curves, *x, groups_of(arms, study.baseline))
        lines.append(f"![Median accuracy over {x[1]}]({link}/{stem}_curves.png)\n")
    return "\n".join(lines)


def _table(table: pd.DataFrame, baseline: str) -> str:
    reads = table["reading_log_odds"].min() < READS_WELL
    rows = []
    for _, row in table.iterrows():
        median = f"{row['accuracy']:.3f}"
        if not math.isnan(row["accuracy_low"]):
            median += f" [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]"
        rows.append(
            {
                "arm": f"**`{row['arm']}`**" if row["arm"] == baseline else f"`{row['arm']}`",
                "runs": row["runs"],
                "log-odds": _with_interval(row, "log_odds", ".2f"),
                **({"log-odds of readings": _with_interval(row, "reading_log_odds", ".2f")} if reads else {}),
                f"minus `{baseline}`": _with_interval(row, "difference", "+.2f"),
                "accuracy (median)": median,
                "accuracy (mean)": f"{row['mean_accuracy']:.3f}",
                "lost form": f"{row['lost_form']} of {row['runs']}",
                "responses": f"{row['completions']:,.0f}",
                "steps": f"{row['optimizer_steps']:,.0f}",
                "rollout tokens": f"{row['rollout_tokens']:,.0f}",
                "sampled tokens": f"{row['sampled_tokens']:,.0f}",
                "CPU seconds": f"{row['cpu_seconds']:.0f}",
            }
        )
    return markdown_table(pd.DataFrame(rows))


READS_WELL = 5.0
"""If the log-odds of right readings are above this in every arm, reading is no matter of the comparison."""


def _with_interval(row: pd.Series, name: str, form: str) -> str:
    if math.isnan(row[name]):
        return ""
    text = f"{row[name]:{form}}"
    if not math.isnan(row[f"{name}_low"]):
        text += f" [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"
    return text


def _tuning(study: StudyConfig, results: StudyResults) -> str:
    if results.tuning.empty:
        return ""
    ends = (min(study.tuning.learning_rate), max(study.tuning.learning_rate))
    rows = []
    for (arm, choice, settings), of_arm in results.tuning.groupby(["arm", "choice", "settings"]):
        means = of_arm.groupby("learning_rate")["accuracy"].mean()
        chosen = results.chosen[arm]
        is_chosen = chosen.settings == (study.arms[arm].choices or [{}])[choice]
        text = f"{chosen.learning_rate:g}" if is_chosen else ""
        if is_chosen and chosen.learning_rate in ends:
            text += " (end of the grid)"
        own = "" if settings == "{}" else f" {settings}"
        rows.append({"arm": f"`{arm}`{own}", "chosen": text} | {f"{rate:g}": f"{a:.3f}" for rate, a in means.items()})
    hours = results.tuning["seconds"].sum() / 3600
    return (
        f"## Tuning\n\nMean accuracy on the tuning split, from {len(results.tuning)} runs of {hours:.1f} hours in "
        f"total.\n\n{markdown_table(pd.DataFrame(rows))}\n"
    )


def _environment(results: StudyResults) -> str:
    environments = pd.DataFrame(list(results.runs["environment"]))
    lines = ["## Computed with\n"]
    mixed = []
    for name in environments.columns:
        values = sorted(environments[name].astype(object).fillna("unknown").astype(str).unique())
        lines.append(f"- {escape_markdown(str(name))}: {escape_markdown(', '.join(values))}")
        mixed += [name] if len(values) > 1 else []
    if "code" in environments and "code" not in mixed:
        mixed = [name for name in mixed if name != "commit"]
        lines.append(
            "\n`code` is a fingerprint of the files of this package that can change a run's numbers, and of the "
            "libraries' versions: all runs were made by the same code, even if their commits differ.\n"
        )
    if mixed:
        lines.append(f"\n**The runs differ in: {', '.join(mixed)}.**\n")
    hours = results.runs["seconds"].sum() / 3600
    lines.append(f"- hours of compared runs, with their evaluation and recordings: {hours:.1f}")
    return "\n".join(lines) + "\n"


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list)
