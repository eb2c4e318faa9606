"""`sapo-trl train`. Its help is read from a file, because importing the settings takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


HELP = Path(__file__).with_name("train_help.txt")
"""`python -m docs.generate.config_table` writes this file, and a test compares it with the settings."""


def main(argv: Sequence[str]) -> int:
    """Print the help, or train, see [`~sapo_trl.cli.train.main`]."""
    if "-h" in argv or "--help" in argv:
        print(HELP.read_text(encoding="utf-8"), end="")
        sys.exit(0)
    from .train import main as train

    return train(argv)
