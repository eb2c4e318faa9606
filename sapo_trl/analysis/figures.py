"""The analyses' figures, each beside a CSV file of the same name with the numbers in it; readable without colours."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plots import curve_styles, new_figure


def plot_lift(path: Path, table: pd.DataFrame, title: str) -> list[Path]:
    """
    Draw Lift–q curves with their bands.

    Args:
        path (`Path`): PNG to write.
        table (`pd.DataFrame`): `curve` (its name), `share`, `lift`, `low`, `high`, one row per point.
        title (`str`): above the axes.

    Returns:
        `list[Path]`: the written files, the PNG and the CSV.
    """
    figure = new_figure(6.5, 4.2)
    axes = figure.add_subplot()
    for style, (name, curve) in zip(
        curve_styles(table["curve"].nunique()), table.groupby("curve", sort=False), strict=True
    ):
        axes.fill_between(curve["share"], curve["low"], curve["high"], color=style["color"], alpha=0.12, linewidth=0)
        axes.plot(curve["share"], curve["lift"], label=name, markersize=4, linewidth=1.2, **style)
    axes.axhline(1.0, color="#777777", linewidth=0.8)
    axes.set(xlabel="share q of tokens, highest entropy first", ylabel="Lift(q)", title=title)
    return _save(figure, axes, path, table)


def plot_ratio_bias(path: Path, table: pd.DataFrame) -> list[Path]:
    """
    Draw the bias of the geometric mean and its bound over training.

    Args:
        path (`Path`): PNG to write.
        table (`pd.DataFrame`): of [`~sapo_trl.analysis.ratio_bias.logged_bias`].

    Returns:
        `list[Path]`: the written files, the PNG and the CSV.
    """
    figure = new_figure(6.5, 4.2)
    axes = figure.add_subplot()
    for style, (column, label) in zip(
        curve_styles(2), (("bias", "arithmetic − geometric mean"), ("bound", "bound")), strict=False
    ):
        # A logarithmic axis has no place for the zeros of updates in which the policy had not moved.
        positive = table[table[column] > 0]
        axes.plot(positive["step"], positive[column], label=label, markersize=3, linewidth=1, **style)
    axes.set(xlabel="optimizer step", ylabel="mean over segments", title="Ratios: arithmetic against geometric mean")
    if (table[["bias", "bound"]] > 0).any().any():
        axes.set_yscale("log")
    return _save(figure, axes, path, table)


def plot_borders(path: Path, table: pd.DataFrame, what: str = "borders between steps") -> list[Path]:
    """
    Draw precision, recall and F1 of cuts with their intervals, beside chance.

    Args:
        path (`Path`): PNG to write.
        table (`pd.DataFrame`): of [`~sapo_trl.analysis.BorderAgreement.table`].
        what (`str`, *optional*, defaults to `"borders between steps"`): name of the places to compare cuts with.

    Returns:
        `list[Path]`: the written files, the PNG and the CSV.
    """
    figure = new_figure(5, 3.8)
    axes = figure.add_subplot()
    _intervals(axes, table["measure"].tolist(), table["value"], table["low"], table["high"], "cuts of the run")
    axes.plot(range(len(table)), table["chance"], "_", color="#d55e00", markersize=28, label="as many random cuts")
    axes.set(ylim=(0, 1.05), title=f"Cuts on {what}")
    return _save(figure, axes, path, table)


def plot_gradient_noise(path: Path, table: pd.DataFrame) -> list[Path]:
    """
    Draw the noise-to-signal ratio of some settings' gradients, with two standard errors to either side.

    Args:
        path (`Path`): PNG to write.
        table (`pd.DataFrame`): `setting` and the fields of [`~sapo_trl.analysis.GradientNoise`], one row per setting.

    Returns:
        `list[Path]`: the written files, the PNG and the CSV.
    """
    figure = new_figure(5, 3.8)
    axes = figure.add_subplot()
    ratio, reach = table["noise_to_signal"], 2 * table["noise_to_signal_error"].fillna(0)
    _intervals(axes, table["setting"].tolist(), ratio, ratio - reach, ratio + reach, "± 2 standard errors")
    axes.set(ylabel="trace of covariance / squared mean", title="Noise to signal of the policy's gradient")
    return _save(figure, axes, path, table)


def _intervals(axes: Axes, names: list[str], values: pd.Series, low: pd.Series, high: pd.Series, label: str) -> None:
    errors = [(values - low).clip(lower=0), (high - values).clip(lower=0)]
    axes.errorbar(range(len(names)), values, errors, fmt="o", color="black", capsize=6, label=label)
    axes.set_xticks(range(len(names)), names)
    axes.margins(x=0.25)


def _save(figure: Figure, axes: Axes, path: Path, table: pd.DataFrame) -> list[Path]:
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    numbers = path.with_suffix(".csv")
    table.to_csv(numbers, index=False)
    return [path, numbers]
