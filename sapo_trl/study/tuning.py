"""Chooses each arm's learning rate from the tuning runs, with the same grid, problems and rule for all arms."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from .cells import Cell


def chosen_learning_rates(results: Iterable[tuple[Cell, dict]]) -> dict[str, float]:
    """
    Each arm's learning rate with the best mean accuracy. Among equally good rates the smallest is chosen.

    Args:
        results (`Iterable[tuple[Cell, dict]]`): the tuning cells with their results.

    Returns:
        `dict[str, float]`: by arm.
    """
    means = tuning_table(results).groupby(["arm", "learning_rate"])["accuracy"].mean()
    return {arm: float(of_arm.droplevel("arm").idxmax()) for arm, of_arm in means.groupby("arm")}


def tuning_table(results: Iterable[tuple[Cell, dict]]) -> pd.DataFrame:
    """One row per tuning run: `arm`, `learning_rate`, `seed`, `accuracy`, `seconds`; sorted by the first three."""
    rows = [
        {
            "arm": cell.arm_name,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "accuracy": result["accuracy"],
            "seconds": result["seconds"],
        }
        for cell, result in results
    ]
    return pd.DataFrame(rows).sort_values(["arm", "learning_rate", "seed"], ignore_index=True)
