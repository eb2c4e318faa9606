"""
The presets for people to read: one Markdown table, and a YAML file for each.

`python -m sapo_trl.preset_table` writes both into the folder it is called in, a clone of the repository.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from .config import SAPOConfig
from .presets import PRESETS


AXES: dict[str, tuple[str, ...]] = {
    "Segmentation": ("segmentation",),
    "Value estimate": (
        "critic",
        "value_state",
        "cliprange_value",
        "value_loss_aggregation",
        "critic_lam",
        "critic_warmup_steps",
        "critic_warmup_tolerance",
        "max_valued_segments",
        "truncated_continuation_reward",
    ),
    "Advantage": (
        "advantage_estimator",
        "lam",
        "length_adaptive_lam",
        "whiten_advantages",
        "advantage_clamp",
        "scale_rewards",
        "advantage_weighting",
    ),
    "Ratio": ("importance_sampling_level", "ratio_reduction"),
    "Clip and loss": (
        "loss_type",
        "epsilon",
        "epsilon_high",
        "delta",
        "loss_aggregation",
        "confident_token_threshold",
        "positive_lm_coef",
    ),
    "KL": ("beta", "kl_placement", "kl_estimator", "kl_aggregation", "use_bias_correction_kl"),
    "Rollouts": ("num_generations",),
}
"""What the algorithms differ in, and the settings that say so: every setting of a preset is in exactly one axis."""

TABLE_START, TABLE_END = "<!-- presets: start -->", "<!-- presets: end -->"
DOCUMENT = Path("docs/algorithms.md")
YAML_FOLDER = Path("trainer_configs/algorithms")


def default_settings() -> dict[str, Any]:
    """The defaults of [`SAPOConfig`] for all settings of [`AXES`]."""
    defaults = {setting.name: setting.default for setting in fields(SAPOConfig)}
    return {name: defaults[name] for names in AXES.values() for name in names}


def markdown_table() -> str:
    """One row for the defaults and one for each preset, with the settings in which it differs from the defaults."""
    lines = [_row(["Preset", *AXES]), _row(["---"] * (len(AXES) + 1))]
    for name, settings in {"*defaults*": default_settings(), **{n: p.settings for n, p in PRESETS.items()}}.items():
        defaults = default_settings()
        shown = {k: v for k, v in settings.items() if name == "*defaults*" or v != defaults[k]}
        cells = [
            "<br>".join(f"`{key}={json.dumps(shown[key])}`" for key in names if key in shown)
            for names in AXES.values()
        ]
        lines.append(_row([name if name == "*defaults*" else f"`{name}`", *cells]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def yaml_text(preset: str) -> str:
    """
    A preset as a configuration file.

    Args:
        preset (`str`): name of the preset.

    Returns:
        `str`: YAML, for `sapo-trl train --config`.
    """
    definition = PRESETS[preset]
    ordered = {
        name: definition.settings[name] for names in AXES.values() for name in names if name in definition.settings
    }
    settings = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)
    return (
        f"# {preset}: {definition.summary}.\n"
        f"# Source: {definition.source}. Written from sapo_trl/presets.py; see docs/algorithms.md.\n"
        f"{settings}"
    )


def main() -> None:
    """Write the table and the files."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(TABLE_START)
    _, _, after = rest.partition(TABLE_END)
    DOCUMENT.write_text(f"{before}{TABLE_START}\n\n{markdown_table()}\n\n{TABLE_END}{after}", encoding="utf-8")
    YAML_FOLDER.mkdir(parents=True, exist_ok=True)
    for preset in PRESETS:
        (YAML_FOLDER / f"{preset}.yaml").write_text(yaml_text(preset), encoding="utf-8")


if __name__ == "__main__":
    main()
