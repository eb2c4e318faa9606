"""`sapo-trl presets`: lists the algorithms, or shows the settings of one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import yaml
from rich.console import Console
from rich.table import Table

from ..presets import PRESETS, preset_settings
from ..short_errors import ShortErrors


def main(argv: Sequence[str], console: Console | None = None) -> int:
    """Print a table of all presets, or the settings of one as YAML. Returns 2 for an unknown name."""
    parser = ShortErrors(
        prog="sapo-trl presets",
        description="List the algorithms, or show the settings of one as YAML, as a start for a settings file.",
    )
    parser.add_argument("name", nargs="?", help="a preset, such as vc_ppo")
    name = parser.parse_args(list(argv)).name
    if name is None:
        table = Table("preset", "description", "source", box=None)
        for preset, entry in PRESETS.items():
            table.add_row(f"[bold]{preset}[/bold]", entry.summary, entry.source)
        (console or Console()).print(table)
        return 0
    try:
        settings = preset_settings(name)
    except ValueError as error:
        print(f"sapo-trl presets: error: {error}", file=sys.stderr)
        return 2
    print(f"# {name}: {PRESETS[name].summary}\n# All other settings are SAPOConfig's defaults. {PRESETS[name].source}")
    print(yaml.safe_dump(settings, sort_keys=False) if settings else "{}", end="")
    return 0
