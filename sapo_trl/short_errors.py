"""Command lines whose mistakes are one line: `sapo-trl train: error: …`."""

from __future__ import annotations

import argparse
from typing import NoReturn


class ShortErrors(argparse.ArgumentParser):
    """A parser that does not print the list of all options before an error."""

    def error(self, message: str) -> NoReturn:
        """Print one line, and end the program with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def hide_negations(parser: argparse.ArgumentParser) -> None:
    """
    Leave `--no_NAME` out of the help, where it would repeat the sentence of `--NAME`. It is accepted as before.

    Args:
        parser (`argparse.ArgumentParser`): a parser of data classes.
    """
    for action in parser._actions:
        if any(option.startswith("--no_") for option in action.option_strings):
            action.help = argparse.SUPPRESS
