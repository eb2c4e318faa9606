"""`sapo-trl train`. Its help is read from a file, because importing the settings takes seconds."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from collections.abc import MutableMapping, Sequence
from pathlib import Path


HELP = Path(__file__).with_name("train_help.txt")
"""`python -m docs.generate.config_table` writes this file, and a test compares it with the settings."""

HUB_ANSWERS_WITHIN = 5.0
"""Seconds in which a hub answers that can be used."""


def main(argv: Sequence[str]) -> int:
    """Print the help, or train, see [`~sapo_trl.cli.train.main`]."""
    if "-h" in argv or "--help" in argv:
        print(HELP.read_text(encoding="utf-8"), end="")
        sys.exit(0)
    if "--dry_run" in argv:
        stay_offline(os.environ)  # before the libraries are imported, which read the environment once
    from .train import main as train

    return train(argv)


def stay_offline(environment: MutableMapping[str, str]) -> None:
    """
    Set `HF_HUB_OFFLINE` if the hub does not answer, so that only files of this machine are looked for.

    Otherwise each missing file costs more than a minute of repeated requests.

    Args:
        environment (`MutableMapping[str, str]`): environment variables, which are changed.
    """
    if "HF_HUB_OFFLINE" in environment:
        return
    endpoint = environment.get("HF_ENDPOINT", "https://huggingface.co")
    if not endpoint.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_ANSWERS_WITHIN).close()
    except urllib.error.HTTPError:
        return  # an answer, too
    except OSError:
        environment["HF_HUB_OFFLINE"] = "1"
        print(f"{endpoint} does not answer: only files of this machine are used (HF_HUB_OFFLINE=1)", file=sys.stderr)
