"""Command lines with one style: a mistake is one line (`sapo-trl train: error: …`), and options have underscores."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class ShortErrors(argparse.ArgumentParser):
    """
    A parser that does not print the list of all options before an error. Its help has `--output_dir` alone; the
    spelling `--output-dir` is accepted where it was given.
    """

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Add an argument, without its spellings with hyphens in the help."""
        action = super().add_argument(*names, **settings)
        # The parser has its own list of all spellings. The action's list is for the help.
        action.option_strings = [
            name for name in action.option_strings if "-" not in name[2:] or name.replace("-", "_") == name
        ]
        return action

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
