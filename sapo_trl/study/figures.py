"""The study's figures, each with its data in a CSV file. Arms differ by line style and marker, not only by colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plots import curve_styles, new_figure
from .results import StudyResults, metrics_of
from .statistics import mean_interval


_GRID = 40
"""Number of points on the common axis for runs with unequal steps."""
MOST_BANDS = 7
"""Largest number of arms in a panel with bands. The bands of more arms would be indistinguishable."""


def styles(names: Sequence[str]) -> dict[str, dict]:
    """A style for each name."""
    looks = (look | {"markersize": 4, "linewidth": 1.4} for look in curve_styles(len(names)))
    return dict(zip(names, looks, strict=True))


def training_curves(
    results: StudyResults,
    task: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    columns: dict[str, str],
    x: str = "completions",
) -> pd.DataFrame:
    """
    The logs of some arms' runs, on a common axis, smoothed over a twentieth of training.

    Args:
        results ([`StudyResults`]): the runs.
        task (`str`): the task.
        arms (`Sequence[str]`): arms; some may have no run.
        seeds (`Sequence[int]`): seeds; some may have no run.
        columns (`dict[str, str]`): logged names and their titles.
        x (`str`, *optional*, defaults to `"completions"`): `"completions"` or `"cpu_seconds"`.

    Returns:
        `pd.DataFrame`: `arm`, `seed`, the axis and the columns (NaN where a run logs none).
    """
    tables = [pd.DataFrame(columns=["arm", "seed", x, *columns.values()])]
    for _, run in results.runs_of(task, arms, seeds).iterrows():
        metrics = metrics_of(run)
        if metrics.empty:  # the run failed at once
            continue
        window = max(len(metrics) // 20, 1)
        grid = np.linspace(0, metrics[x].iloc[-1], _GRID)
        table = pd.DataFrame({"arm": run["arm"], "seed": run["seed"], x: grid})
        for name, label in columns.items():
            logged = metrics.dropna(subset=[name]) if name in metrics else metrics.iloc[:0]
            if logged.empty:
                table[label] = np.nan
                continue
            # A quantity that is measured now and then keeps its points and is not smoothed.
            smooth = logged[name].rolling(window if len(logged) == len(metrics) else 1, 1, center=True).mean()
            table[label] = np.interp(grid, logged[x], smooth, left=np.nan, right=np.nan)
        tables.append(table)
    return pd.concat(tables[1:] or tables, ignore_index=True)


def plot_curves(path: Path, curves: pd.DataFrame, x: str, x_label: str, arms: Sequence[str], title: str) -> None:
    """
    Draw one panel per column of [`training_curves`]: the mean over seeds with its bootstrap band. A single seed has no
    band, and a panel with too many arms has none.
    """
    columns = [name for name in curves.columns if name not in ("arm", "seed", x)]
    figure = new_figure(5.2 * len(columns) + 1.8, 4.0)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    style = styles(arms)
    for panel, column in zip(panels, columns, strict=True):
        for arm in arms:
            of_arm = curves[curves["arm"] == arm].dropna(subset=[column])
            if of_arm.empty:
                continue
            # On the time axis, runs of an arm differ in length. The mean ends with the shortest run.
            end = of_arm.groupby("seed")[x].max().min()
            grid = np.linspace(of_arm.groupby("seed")[x].min().max(), end, _GRID)
            rows = np.stack([np.interp(grid, run[x], run[column]) for _, run in of_arm.groupby("seed")])
            panel.plot(grid, rows.mean(axis=0), markevery=6, label=arm, **style[arm])
            if len(rows) > 1 and len(arms) <= MOST_BANDS:
                bands = [mean_interval(rows[:, i]) for i in range(_GRID)]
                panel.fill_between(
                    grid, [b.low for b in bands], [b.high for b in bands], color=style[arm]["color"], alpha=0.12, lw=0
                )
        panel.set(xlabel=x_label, ylabel=column)
        if "explained variance" in column:
            panel.set_ylim(-1, 1)  # a critic that has not learned yet can be at minus several hundred
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    _legend(figure, panels)
    _save(figure, path, curves)


def plot_differences(path: Path, data: pd.DataFrame, x: str, baseline: str) -> None:
    """
    Draw the differences of arms to the baseline over a dial of the task, with Student's 95 % intervals.

    Args:
        path (`Path`): PNG to write.
        data (`pd.DataFrame`): `arm`, the dial, `difference`, `t_low` and `t_high` (NaN without an interval).
        x (`str`): column of the dial.
        baseline (`str`): the arm to compare with.
    """
    figure = new_figure(6.5, 4.2)
    panel = figure.add_subplot()
    arms = list(dict.fromkeys(data["arm"]))
    style = styles(arms)
    spread = data[x].max() - data[x].min() or 1
    for arm, offset in zip(arms, np.linspace(-0.015, 0.015, len(arms)) * spread, strict=True):
        of_arm = data[data["arm"] == arm]
        errors = [of_arm["difference"] - of_arm["t_low"], of_arm["t_high"] - of_arm["difference"]]
        panel.errorbar(of_arm[x] + offset, of_arm["difference"], errors, capsize=3, label=arm, **style[arm])
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set(xlabel=x, ylabel=f"accuracy minus {baseline}'s")
    panel.set_xticks(sorted(set(data[x])))
    panel.grid(alpha=0.3)
    _legend(figure, [panel])
    _save(figure, path, data)


def plot_axis(path: Path, data: pd.DataFrame, x: str) -> None:
    """
    Draw the accuracy over a number that varies between arms: every run, and the means with their bootstrap intervals.

    Args:
        path (`Path`): PNG to write.
        data (`pd.DataFrame`): `arm`, `seed`, `accuracy` and the number.
        x (`str`): column of the number.
    """
    figure = new_figure(6.0, 4.0)
    panel = figure.add_subplot()
    means = {number: mean_interval(of_number) for number, of_number in data.groupby(x)["accuracy"]}
    values = [interval.value for interval in means.values()]
    errors = [
        [interval.value - interval.low for interval in means.values()],
        [interval.high - interval.value for interval in means.values()],
    ]
    panel.scatter(data[x], data["accuracy"], s=18, facecolors="none", edgecolors="#555555", label="one run")
    panel.errorbar(list(means), values, errors, fmt="D-", color="black", capsize=3, markersize=5, label="mean")
    panel.set(xlabel=x, ylabel="accuracy")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=9)
    _save(figure, path, data)


def plot_accuracies(path: Path, runs: pd.DataFrame, arms: Sequence[str], title: str) -> None:
    """
    Draw every run as a point, with the mean of each arm and its bootstrap interval beside it.

    Args:
        path (`Path`): PNG to write.
        runs (`pd.DataFrame`): `arm`, `seed` and `accuracy`.
        arms (`Sequence[str]`): arms that have runs, from the top.
        title (`str`): above the axes.
    """
    figure = new_figure(7.0, 0.42 * len(arms) + 1.6)
    panel = figure.add_subplot()
    for position, arm in enumerate(arms):
        scores = runs.loc[runs["arm"] == arm, "accuracy"]
        interval = mean_interval(scores)
        errors = [[interval.value - interval.low], [interval.high - interval.value]]
        panel.scatter(scores, [position] * len(scores), s=18, facecolors="none", edgecolors="#555555")
        panel.errorbar(interval.value, position + 0.22, xerr=errors, fmt="D", color="black", capsize=3, markersize=5)
    panel.set_yticks(range(len(arms)), arms)
    panel.invert_yaxis()
    panel.set(xlabel="accuracy", title=title)
    panel.grid(axis="x", alpha=0.3)
    _save(figure, path, runs[["arm", "seed", "accuracy"]])


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    entries = {}
    for panel in panels:  # an arm may be in some of them only
        entries |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside right center", frameon=False, fontsize=9)


def _save(figure: Figure, path: Path, data: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    data.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
