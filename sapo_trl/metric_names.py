"""
The names of metrics in the log: the present names, and old names that are logged beside them for one release.

A logged name starts with its group: `critic/`, `segments/`, `advantages/`, and so on. TRL's own metrics keep TRL's
names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar


T = TypeVar("T")

OLD_NAMES_UNTIL = "0.2.0"
"""The release that no longer logs the old names. `OLD_NAMES` itself stays, for reading old logs."""

OLD_NAMES = {
    "value_loss": "critic/loss",
    "value/clip_ratio": "critic/clip_ratio",
    "value/explained_variance": "critic/explained_variance",
    "value/gated": "critic/gated",
    "value/mean": "critic/mean_value",
    "value/monte_carlo_explained_variance": "critic/monte_carlo_explained_variance",
    "critic_grad_norm": "critic/grad_norm",
    "critic_lr": "critic/learning_rate",
    "critic_warmup": "critic/warmup",
    "value_diagnostics/critic_mean": "critic/diagnostics/critic_mean",
    "value_diagnostics/explained_variance": "critic/diagnostics/explained_variance",
    "value_diagnostics/mae": "critic/diagnostics/mae",
    "value_diagnostics/monte_carlo_mean": "critic/diagnostics/monte_carlo_mean",
    "value_diagnostics/rank_correlation": "critic/diagnostics/rank_correlation",
    "value_diagnostics/standard_error": "critic/diagnostics/standard_error",
    "value_diagnostics/tokens": "critic/diagnostics/tokens",
}
"""Each old name and its present name."""

_EVALUATION = "eval_"


def present_name(name: str) -> str:
    """
    The present name of a metric; a name that has not changed is returned as it is.

    Args:
        name (`str`): a name from a log, with or without `eval_`.
    """
    prefix = _EVALUATION if name.startswith(_EVALUATION) else ""
    return prefix + OLD_NAMES.get(name.removeprefix(prefix), name.removeprefix(prefix))


def with_present_names(entry: Mapping[str, T]) -> dict[str, T]:
    """
    A log entry under present names alone. If it has a metric under both names, the value of the present name counts.

    Args:
        entry (`Mapping[str, T]`): values by name, of this release or an earlier one.
    """
    renamed = {present_name(name): value for name, value in entry.items()}
    return {name: entry.get(name, value) for name, value in renamed.items()}


def with_old_names(metrics: Mapping[str, T]) -> dict[str, T]:
    """
    Metrics under their present names, then the same values under old names.

    Args:
        metrics (`Mapping[str, T]`): values by present name, with or without `eval_`.
    """
    names = {prefix + old: prefix + name for prefix in ("", _EVALUATION) for old, name in OLD_NAMES.items()}
    return {**metrics, **{old: metrics[name] for old, name in names.items() if name in metrics}}
