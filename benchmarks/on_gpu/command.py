"""
Check the environment, run the GPU tests, and measure the benchmarks' rows until the time is over.

    make gpu                                   # ten minutes, Qwen2.5-VL-3B's shape, on a GPU
    make gpu ARGS="--size tiny --minutes 5"    # a tiny model, on a CPU too

No network is needed. Models have random weights. `make gpu-wheels` collects packages that the machine lacks, on a
machine with a network. They are installed into an environment below `build/`, and nothing else is changed.

Each row runs in a process of its own, the most important rows first. After each row the results are written to
`on_gpu.json` and, as tables for `docs/performance.md`, `on_gpu.md`. A row that would not fit into the time left is
not started; a row that takes much longer than expected is killed. The same command continues with missing rows.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .environment import ROOT, WHEELS, UnfitMachine, check, prepare
from .row_list import ROWS, SIZES, Row
from .runner import OUT_OF_MEMORY, Report, Runner
from .table import as_markdown


# Kept for the last table and the end of a killed process.
RESERVE_SECONDS = 5


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="on_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="time limit, from the start of this command (10)")
    parser.add_argument("--size", choices=tuple(SIZES), default="3b", help="shape of the model (3b)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows or tables to run, such as equal or lengths")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results", help="folder for the results (gpu-results)")
    parser.add_argument("--retry", action="store_true", help="measure failed rows again")
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="folder of wheels to install (gpu-wheels)")
    return parser


def chosen(rows: Sequence[Row], names: list[str] | None) -> list[Row]:
    """
    The rows with these names, or in tables with these names; by default all.

    Raises:
        ValueError: for a name that no row and no table has.
    """
    for name in names or []:
        if not any(name in (row.name, row.table) for row in rows):
            known = ", ".join(dict.fromkeys(row.table for row in rows))
            raise ValueError(f"--only {name}: no row and no table has this name; the tables are {known}")
    return [row for row in rows if names is None or row.name in names or row.table in names]


def load(out: Path, machine: dict[str, Any], size: str, rows: Sequence[Row], retry: bool = False) -> Report:
    """
    The results of an earlier call on the same machine, or a report without rows.

    Args:
        out (`Path`): folder of the results.
        machine (`dict`): the machine and its versions, see [`~on_gpu.environment.check`].
        size (`str`): size of the model.
        rows (`Sequence[Row]`): the whole list. Results of other rows, or with other options, are dropped.
        retry (`bool`): whether failed rows are left out, so that they run again.

    Raises:
        UnfitMachine: if the folder has results of another machine, of other versions, or of another size.
    """
    new = {**machine, "size": size, "rows": {}, "cut_off": {}}
    file = out / "on_gpu.json"
    if not file.is_file():
        return new
    old = json.loads(file.read_text())
    for what in ("machine", "versions", "size"):
        if old[what] != new[what]:
            raise UnfitMachine(
                f"{file} has results for another {what} ({old[what]}, now {new[what]}). "
                "Give another folder with --out."
            )
    commands = {row.name: row.arguments(size) for row in rows}
    for name, row in old["rows"].items():
        if row["command"] == commands.get(name) and not (retry and "error" in row):
            new["rows"][name] = row
    new["cut_off"] = old["cut_off"]
    return new


def write(report: Report, rows: Sequence[Row], out: Path) -> None:
    """Write the report and its tables. A reader never sees half of a file."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("on_gpu.json", json.dumps(report, indent=2) + "\n"), ("on_gpu.md", as_markdown(report, rows))):
        part = out / f"{name}.part"
        part.write_text(text)
        part.replace(out / name)


def main(argv: list[str] | None = None) -> int:
    """
    Check, measure, write, print.

    Returns:
        `int`: 0 if all is well, also at the time limit; 1 if a row failed for another reason than memory; 2 if the
        machine cannot run the rows; 130 after an interrupt.
    """
    started = time.monotonic()
    options = parser().parse_args(sys.argv[1:] if argv is None else argv)
    if options.minutes <= 0:
        parser().error(f"--minutes must be positive, got {options.minutes:g}")
    try:
        rows = chosen(ROWS, options.only)
    except ValueError as error:
        parser().error(str(error))
    # A machine that takes itself back sends this signal first.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        python, warnings = prepare(options.wheels)
        machine = check(python, needs_gpu=options.size != "tiny")
        machine["warnings"] = warnings + machine["warnings"]
        report = load(options.out, machine, options.size, ROWS, options.retry)
        describe(machine)
        write(report, ROWS, options.out)
        deadline = started + 60 * options.minutes - RESERVE_SECONDS
        runner = Runner(
            python, report, options.size, deadline, options.out / "on_gpu.log", lambda r: write(r, ROWS, options.out)
        )
        left = runner.run(rows)
    except UnfitMachine as error:
        print(f"on_gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Interrupted. Finished rows are in {options.out}; the same command continues.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"\n{as_markdown(report, ROWS)}")
    if left:
        print(f"The time is over. Rows left: {len(left)} of {len(rows)}. The same command continues with them.")
    errors = [row["error"] for row in report["rows"].values() if "error" in row]
    return int(any(error != OUT_OF_MEMORY for error in errors))


def describe(machine: dict[str, Any]) -> None:
    print(f"{machine['machine']}; {', '.join(f'{name} {version}' for name, version in machine['versions'].items())}")
    for warning in machine["warnings"]:
        print(f"warning: {warning}")
    sys.stdout.flush()
