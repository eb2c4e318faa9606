"""
How the time of a step grows with the length of responses: the model's forwards and backwards, and everything else.

Each length is measured with the set-up of `profile_step.py`. The length is the longest of a rollout, and lengths are
log-normal below it.

    python benchmarks/length_scaling.py --row sapo_separate --out results                 # on a GPU
    python benchmarks/length_scaling.py --row sapo_separate --size tiny --out results     # on a CPU too

It writes `length_scaling_ROW.json` and prints a table. The last column is the slope of a line through the logarithms:
the power of the length. No stage's power may be larger than the model's power.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from profile_step import profile
from rows import machine
from update_cost import ROWS, complete
from update_cost import parser as update_cost_parser


LENGTHS = (256, 512, 1024, 2048, 4096)


def scaling(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of each stage at each length so far, and the power of the length with which they grow."""
    seconds: dict[str, list[float]] = {}
    for done, length in enumerate(options.lengths, start=1):
        options.completion_length = length
        stages = profile(options)["stages"]
        rest = {name: stages.pop(name) for name in ("everything else", "optimizers")}
        for name, value in {"model": sum(stages.values()), **rest}.items():
            seconds.setdefault(name, []).append(value)
        lengths, powers = list(options.lengths[:done]), {}
        if done > 1:
            powers = {name: float(np.polyfit(np.log(lengths), np.log(row), 1)[0]) for name, row in seconds.items()}
        yield {"lengths": lengths, "seconds": seconds, "powers": powers}
        # A trainer and its model refer to each other, so they would stay beside the next ones.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print."""
    parser = update_cost_parser()
    parser.description = __doc__
    parser.set_defaults(row="sapo_separate")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="lengths of the longest response")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if len(options.lengths) < 2:
        parser.error(f"--lengths must have at least two lengths, got {options.lengths}")
    complete(options)
    options.out.mkdir(parents=True, exist_ok=True)
    for found in scaling(options):
        report = {"row": options.row, "machine": machine(), **found}
        # Early, so that an interrupted run leaves the shorter lengths.
        (Path(options.out) / f"length_scaling_{options.row}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{ROWS[options.row][0]}, {report['machine']}: seconds per rollout\n")
    print(f"| stage | {' | '.join(map(str, report['lengths']))} | power |")
    print(f"| --- |{' ---: |' * (len(report['lengths']) + 1)}")
    for name, row in report["seconds"].items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} | {report['powers'][name]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
