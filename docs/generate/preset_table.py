"""
The presets for people to read: one Markdown table, and a YAML file for each.

`python -m docs.generate.preset_table` writes both into the folder it is called in, a clone of the repository.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from sapo_trl.config import default_settings
from sapo_trl.presets import AXES, PRESETS


TABLE_START, TABLE_END = "<!-- presets: start -->", "<!-- presets: end -->"
DOCUMENT = Path("docs/algorithms.md")
YAML_FOLDER = Path("trainer_configs/algorithms")


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
