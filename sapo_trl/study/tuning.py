"""Chooses each arm's settings from the tuning runs, with the same grid, problems and rule for all arms."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pandas as pd

from .cells import Cell, Choice


def chosen_settings(results: Iterable[tuple[Cell, dict]], choices: dict[str, list[dict]]) -> dict[str, Choice]:
    """
    Each arm's learning rate, and its further choice if it has some, with the best mean accuracy. Of equally good ones
    the smallest rate and then the first choice are taken.

    Args:
        results (`Iterable[tuple[Cell, dict]]`): the tuning cells with their results.
        choices (`dict[str, list[dict]]`): by arm, its further choices.

    Returns:
        `dict[str, Choice]`: by arm.
    """
    results = list(results)
    if not results:  # every arm has a fixed rate
        return {}
    means = tuning_table(results, choices).groupby(["arm", "learning_rate", "choice"])["accuracy"].mean()
    chosen = {}
    for arm, of_arm in means.groupby("arm"):
        rate, choice = of_arm.droplevel("arm").idxmax()
        chosen[arm] = Choice(float(rate), (choices.get(arm) or [{}])[int(choice)])
    return chosen


def tuning_table(results: Iterable[tuple[Cell, dict]], choices: dict[str, list[dict]]) -> pd.DataFrame:
    """
    One row per tuning run: `arm`, `learning_rate`, `choice` (its index), `settings` (of the choice, as text), `world`,
    `seed`, `accuracy`, `log_odds`, `complete`, `seconds`.
    """
    rows = []
    for cell, result in results:
        of_arm = choices.get(cell.arm_name) or [{}]
        index = next(i for i, settings in enumerate(of_arm) if settings.items() <= cell.arm.settings.items())
        rows.append(
            {
                "arm": cell.arm_name,
                "learning_rate": cell.learning_rate,
                "choice": index,
                "settings": json.dumps(of_arm[index]),
                "world": cell.task.world,
                "seed": cell.seed,
                **{name: result[name] for name in ("accuracy", "log_odds", "complete", "seconds")},
            }
        )
    order = ["arm", "learning_rate", "choice", "world", "seed"]
    return pd.DataFrame(rows).sort_values(order, ignore_index=True)
