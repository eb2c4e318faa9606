"""The study's figures, each with its data in a CSV file. Everything differs by marker and line, not only by colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plots import curve_styles, new_figure
from .comparisons import Comparison
from .results import metrics_of
from .verdicts import CANNOT_TELL, HELD, NOT_HELD, Verdict


MOST_CURVES = 5
"""Largest number of curves in a panel."""
_MARKS = {HELD: ("o", "black"), NOT_HELD: ("s", "white"), CANNOT_TELL: ("X", "#999999")}


def plot_effects(path: Path, found: Sequence[Verdict]) -> None:
    """
    Draw the effects of the preregistered tests with their intervals, beside the smallest effect that would matter.

    Args:
        path (`Path`): PNG to write.
        found (`Sequence[Verdict]`): verdicts with an effect.
    """
    kinds = {
        "difference in log-odds": [v for v in found if v.test.measure.endswith("log_odds")],
        "difference in accuracy, or in the share of runs": [v for v in found if not v.test.measure.endswith("odds")],
    }
    kinds = {label: rows for label, rows in kinds.items() if rows}
    figure = new_figure(8.5, 1.2 * len(kinds) + 0.42 * len(found) + 0.6)
    panels = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=[len(rows) + 1 for rows in kinds.values()])
    data = []
    for panel, (label, rows) in zip(panels[:, 0], kinds.items(), strict=True):
        for position, one in enumerate(rows):
            marker, face = _MARKS[one.verdict]
            smallest = one.test.smallest * (-1 if one.test.side == "less" else 1)
            effect = one.effect
            errors = [[effect.value - effect.low], [effect.high - effect.value]]
            panel.errorbar(effect.value, position, xerr=errors, color="black", capsize=3, fmt="none", linewidth=1)
            panel.plot(effect.value, position, marker, color="black", markerfacecolor=face, markersize=8)
            panel.plot(smallest, position, "|", color="black", markersize=14, markeredgewidth=2)
            row = {"test": one.name, "measure": one.test.measure, "effect": effect.value, "low": effect.low}
            data.append(row | {"high": effect.high, "smallest": smallest, "verdict": one.verdict})
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(rows)), [one.name for one in rows])
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.set_xlabel(label)
        panel.grid(axis="x", alpha=0.3)
    handles = [
        panels[0, 0].plot([], [], marker, color="black", markerfacecolor=face, linestyle="none", label=name)[0]
        for name, (marker, face) in _MARKS.items()
    ]
    handles += panels[0, 0].plot([], [], "|", color="black", markersize=12, linestyle="none", label="smallest effect")
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path, pd.DataFrame(data))


def plot_runs(path: Path, comparison: Comparison, runs: pd.DataFrame, column: str, label: str) -> None:
    """
    Draw every run as a point, with the mean of each arm and its Student interval below. Crosses are runs that lost
    their form.

    Args:
        path (`Path`): PNG to write.
        comparison ([`Comparison`]): the arms, from the top.
        runs (`pd.DataFrame`): their runs.
        column (`str`): column of a run's measure and of the comparison's mean.
        label (`str`): of the axis.
    """
    table = comparison.table
    figure = new_figure(7.0, 0.45 * len(table) + 1.7)
    panel = figure.add_subplot()
    for position, row in table.iterrows():
        of_arm = runs[runs["arm"] == row["arm"]]
        for lost, marker in ((False, "o"), (True, "x")):
            scores = of_arm.loc[of_arm["lost_form"] == lost, column]
            face = {"facecolors": "none", "edgecolors": "#555555"} if marker == "o" else {"color": "#555555"}
            panel.scatter(scores, [position - 0.12] * len(scores), s=20, marker=marker, linewidths=1, **face)
        errors = np.nan_to_num([[row[column] - row[f"{column}_low"]], [row[f"{column}_high"] - row[column]]])
        panel.errorbar(row[column], position + 0.22, xerr=errors, fmt="D", color="black", capsize=3, markersize=5)
    panel.set_yticks(range(len(table)), table["arm"])
    panel.set_ylim(len(table) - 0.4, -0.6)
    panel.set(xlabel=f"{label}: runs (○, lost form ×), mean (◆)", title=f"{comparison.name}, {comparison.task}")
    panel.grid(axis="x", alpha=0.3)
    _save(figure, path, runs[["arm", "world", "seed", column, "lost_form"]])


def plot_axis(path: Path, runs: pd.DataFrame, x: str, column: str, label: str) -> None:
    """
    Draw a measure over a number that varies between arms: every run, and the medians.

    Args:
        path (`Path`): PNG to write.
        runs (`pd.DataFrame`): `arm`, `world`, `seed`, the number and the measure.
        x (`str`): column of the number.
        column (`str`): column of the measure.
        label (`str`): of the measure.
    """
    figure = new_figure(6.0, 4.0)
    panel = figure.add_subplot()
    panel.scatter(runs[x], runs[column], s=18, facecolors="none", edgecolors="#555555", label="one run")
    medians = runs.groupby(x)[column].median()
    panel.plot(medians.index, medians, "D-", color="black", markersize=5, label="median")
    panel.set(xlabel=x, ylabel=label)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=9)
    _save(figure, path, runs)


def training_curves(runs: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """
    The logs of some runs.

    Args:
        runs (`pd.DataFrame`): the runs.
        columns (`dict[str, str]`): logged names and their titles.

    Returns:
        `pd.DataFrame`: one row per rollout: `arm`, `world`, `seed`, `rollout`, `step`, `completions`, and the columns
        (NaN where a run logs none). A run that diverged has rewards of 0 in the rollouts that it lacks.
    """
    tables = []
    for _, run in runs.iterrows():
        metrics = metrics_of(run)
        table = metrics.reindex(columns=["completions", *columns]).rename(columns=columns)
        table.insert(0, "rollout", range(len(table)))
        table["step"] = run["optimizer_steps"] / max(len(table), 1) * table["rollout"]
        tables.append(table.assign(arm=run["arm"], world=run["world"], seed=run["seed"], failed=run["failed"]))
    curves = pd.concat(tables, ignore_index=True)
    last = curves["rollout"].max()
    padding = []
    for (_, _, _), of_run in curves.groupby(["arm", "world", "seed"], sort=False):
        end = of_run.iloc[-1]
        if isinstance(end["failed"], str) and end["rollout"] < last:
            step, size = (end[name] / max(end["rollout"], 1) for name in ("step", "completions"))
            for rollout in range(int(end["rollout"]) + 1, int(last) + 1):
                row = {"rollout": rollout, "step": rollout * step, "completions": rollout * size}
                row |= {columns["reward"]: 0.0} if "reward" in columns else {}
                padding.append(row | {name: end[name] for name in ("arm", "world", "seed")})
    return pd.concat([curves, pd.DataFrame(padding)], ignore_index=True).drop(columns="failed")


def plot_curves(path: Path, curves: pd.DataFrame, x: str, x_label: str, groups: Sequence[Sequence[str]]) -> None:
    """
    Draw the medians over runs, one row of panels per group of arms and one column per measure.

    A median needs half of the runs: it does not follow the few that broke, and no curve ends where one run ended.

    Args:
        path (`Path`): PNG to write.
        curves (`pd.DataFrame`): from [`training_curves`].
        x (`str`): `"step"` or `"completions"`.
        x_label (`str`): of the axis.
        groups (`Sequence[Sequence[str]]`): arms of each row of panels, from [`groups_of`].
    """
    keys = ("arm", "world", "seed", "rollout", "step", "completions")
    columns = [name for name in curves.columns if name not in keys]
    medians = curves.groupby(["arm", "rollout"])[[x, *columns]].median().reset_index()
    figure = new_figure(4.6 * len(columns) + 2.0, 3.1 * len(groups) + 0.4)
    panels = figure.subplots(len(groups), len(columns), squeeze=False, sharex=True, sharey="col")
    for row, arms in zip(panels, groups, strict=True):
        style = dict(zip(arms, curve_styles(len(arms)), strict=True))
        for panel, column in zip(row, columns, strict=True):
            for place, arm in enumerate(arms):
                of_arm = medians[medians["arm"] == arm].dropna(subset=[column])
                every = (place % 4, 4) if len(of_arm) > 8 else 1  # markers beside one another, not on top
                look = {"markevery": every, "markersize": 5, "linewidth": 1.3, **style[arm]}
                panel.plot(of_arm[x], of_arm[column], label=arm, **look)
            panel.set_ylabel(column)
            if "explained variance" in column:
                panel.set_ylim(-1, 1)
            panel.grid(alpha=0.3)
        row[-1].legend(*_handles(row), loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel(x_label)
    _save(figure, path, medians)


def groups_of(arms: Sequence[str], baseline: str) -> list[list[str]]:
    """Arms in groups of at most [`MOST_CURVES`], the baseline in each."""
    first = [baseline] if baseline in arms else []
    others = [arm for arm in arms if arm != baseline]
    size = MOST_CURVES - len(first)
    return [[*first, *others[i : i + size]] for i in range(0, len(others), size)] or [first]


def _handles(panels: Sequence[Axes]) -> tuple[list, list]:
    entries = {}
    for panel in panels:  # an arm may be in some of them only
        entries |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    return list(entries.values()), list(entries)


def _save(figure: Figure, path: Path, data: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    data.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
