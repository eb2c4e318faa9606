"""`sapo-trl analyze`: questions to the recordings of a finished run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..foreign_text import visible
from ..short_errors import ShortErrors


def main(argv: Sequence[str], console: Console | None = None) -> int:
    """
    Parse `argv`, analyse, print a table and the paths of the written files.

    Args:
        argv (`Sequence[str]`): arguments after `analyze`.
        console ([`~rich.console.Console`], *optional*): where to print. Defaults to the terminal.

    Returns:
        `int`: exit code: 0; arguments or files that do not fit exit with 2 and one line.
    """
    own = parser()
    # `ratio-bias` is `ratio_bias`.
    names = [argument if argument.startswith("-") else argument.replace("-", "_") for argument in argv[:1]]
    arguments = own.parse_args([*names, *argv[1:]])
    from . import questions

    try:
        getattr(questions, arguments.run)(arguments, console or Console())
    except (ValueError, OSError) as error:
        own.exit(2, f"{own.prog} {arguments.analysis}: error: {visible(' '.join(str(error).split()))}\n")
    return 0


def parser() -> ShortErrors:
    """One subcommand per analysis."""
    own = ShortErrors(
        prog="sapo-trl analyze",
        description="Answer questions about segments from a run's recordings. Each analysis writes a figure and a CSV "
        "file of the same name, and prints a summary. docs/analysis.md has the definitions.",
    )
    analyses = own.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")

    lift = _add(analyses, "lift", "run_lift", "do values change more at tokens of high entropy?")
    lift.add_argument("run_folder", type=Path, metavar="RUN", help="folder with a SegmentationCallback's files")
    lift.add_argument(
        "--values", type=Path, metavar="FOLDER", help="ValueDiagnostics' files: adds Lift of Monte-Carlo values"
    )
    _add_bootstrap(lift)

    bias = _add(
        analyses, "ratio_bias", "run_ratio_bias", "how far are segments' ratios from their tokens' mean ratio?"
    )
    bias.add_argument(
        "run_folder", type=Path, metavar="RUN", help="trainer_state.json, a .jsonl log, or a folder with one"
    )

    borders = _add(analyses, "borders", "run_borders", "do cuts fall on true borders between steps?")
    borders.add_argument("run_folder", type=Path, metavar="RUN", help="folder with a SegmentationCallback's files")
    truth = borders.add_mutually_exclusive_group()
    truth.add_argument(
        "--pattern", default=r"\n+", help=r"regular expression; a step ends at the end of a match (\n+)"
    )
    truth.add_argument(
        "--borders",
        type=Path,
        metavar="FILE",
        help="file of true borders instead, one JSON object a line: step, process, response (its place in the file) "
        "and borders (the indices of the loss tokens that end a step)",
    )
    _add_bootstrap(borders)

    noise = _add(analyses, "gradient_variance", "run_gradient_variance", "which granularity has the noisier gradient?")
    noise.add_argument(
        "results", nargs="+", metavar="NAME=FILE", help="file that GradientVariance wrote, and its name"
    )
    return own


def _add(analyses, name: str, run: str, question: str) -> ShortErrors:
    added = analyses.add_parser(name, help=question, description=question[0].upper() + question[1:])
    added.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the figure and the table")
    added.set_defaults(run=run)
    return added


def _add_bootstrap(added: argparse.ArgumentParser) -> None:
    added.add_argument("--confidence", type=float, metavar="P", default=0.95, help="confidence of intervals (0.95)")
    added.add_argument("--resamples", type=int, metavar="N", default=2000, help="bootstrap draws of responses (2000)")
    added.add_argument("--seed", type=int, metavar="N", default=0, help="seed of the draws (0)")
