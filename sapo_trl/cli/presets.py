"""`sapo-trl presets`: the algorithms, and the settings of one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import yaml
from rich.console import Console
from rich.table import Table

from ..presets import PRESETS, preset_settings


def main(argv: Sequence[str], console: Console | None = None) -> int:
    """Print a table of all presets, or one as YAML. Returns 2 for a name that is none."""
    parser = argparse.ArgumentParser(
        prog="sapo-trl presets",
        description="List the algorithms; or show the settings of one, as YAML to start a file from.",
    )
    parser.add_argument("name", nargs="?", help="a preset, such as vc_ppo")
    name = parser.parse_args(list(argv)).name
    if name is None:
        table = Table("preset", "what it is", "source", box=None)
        for preset, entry in PRESETS.items():
            table.add_row(f"[bold]{preset}[/bold]", entry.summary, entry.source)
        (console or Console()).print(table)
        return 0
    try:
        settings = preset_settings(name)
    except ValueError as error:
        print(f"sapo-trl presets: error: {error}", file=sys.stderr)
        return 2
    print(f"# {name}: {PRESETS[name].summary}\n# Everything else is SAPOConfig's default. {PRESETS[name].source}")
    print(yaml.safe_dump(settings, sort_keys=False) if settings else "{}", end="")
    return 0
