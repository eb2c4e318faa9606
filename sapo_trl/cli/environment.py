"""`sapo-trl env`: information on the machine for a bug report."""

from __future__ import annotations

from collections.abc import Sequence

from .. import __version__
from ..short_errors import ShortErrors


def main(argv: Sequence[str]) -> int:
    """Print this package's version and the output of `trl env`."""
    ShortErrors(prog="sapo-trl env", description="Print versions and devices.").parse_args(list(argv))
    from trl.scripts.env import print_env

    print(f"- sapo_trl version: {__version__}", end="")
    print_env()
    return 0
