"""`sapo-trl demo`: the arguments of the demo."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..short_errors import ShortErrors


def main(argv: Sequence[str]) -> int:
    """Run the demo with arguments from the command line."""
    parser = ShortErrors(
        prog="sapo-trl demo",
        description="Train a tiny vision-language model on a CPU and measure its accuracy before and after SAPO.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, default=Path("outputs/demo"), help="folder for the results"
    )
    parser.add_argument("--rollouts", type=_positive, default=12, help="training rollouts, each of 128 responses")
    parser.add_argument("--problems", type=_positive, default=512, help="test problems for each measured accuracy")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    arguments = parser.parse_args(list(argv))
    from .demo_run import run_demo

    return run_demo(arguments.output_dir, arguments.rollouts, arguments.problems, arguments.seed)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
