"""
Benchmarks with a row for each trainer: their common options, a process for each row, and the report.

`memory_and_speed.py` and `update_cost.py` are such benchmarks. Each has only its own measurement and its own table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from sapo_trl.planner.setup import GIB


OUT_OF_MEMORY = "out of memory"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")

Row = dict[str, Any]
"""The numbers of a row, or its `error`."""


def parser(description: str, rows: Iterable[str], **defaults: Any) -> argparse.ArgumentParser:
    """
    The common options: the shape of the model, the batch, and the rows.

    Args:
        description (`str`): description of the script.
        rows (`Iterable[str]`): names of all rows.
        **defaults: default values of options.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = tuple(rows)
    parser.add_argument("--size", choices=("3b", "tiny"), default="3b", help="shape of the model")
    parser.add_argument("--hidden_size", type=int, help="hidden size of a wider tiny model, a multiple of 64")
    parser.add_argument("--layers", type=int, help="layers of the language model, if not the size's own number")
    parser.add_argument("--rows", nargs="+", choices=names, default=list(names), help="rows to measure")
    parser.add_argument("--micro_batch", type=int)
    parser.add_argument("--accumulation", type=int)
    parser.add_argument("--completion_length", type=int, help="tokens of the longest response")
    parser.add_argument("--image_size", type=int, default=448, help="width and height in pixels, a multiple of 28")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights (GPU: bfloat16)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the results")
    parser.add_argument("--row", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    return parser


def measure_here(options: argparse.Namespace, measure: Callable[[str, argparse.Namespace], Row]) -> int:
    """Measure the row of this process (`--row`), and write its numbers to the file `--result`."""
    try:
        found = measure(options.row, options)
    except torch.OutOfMemoryError:
        found = {"error": OUT_OF_MEMORY}
    options.result.write_text(json.dumps(found))
    return 0


def measured(script: str, arguments: list[str], names: Iterable[str]) -> Iterator[tuple[str, Row]]:
    """Names and numbers of rows. Each row is measured in a separate process, by the script with these arguments."""
    for name in names:
        found = _run_row(script, [*arguments, "--row", name])
        print(name, json.dumps(found), file=sys.stderr, flush=True)
        yield name, found


def _run_row(script: str, arguments: list[str]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, script, *arguments, "--result", str(result)]
        process = subprocess.run(command, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1", **os.environ})
        if result.is_file():
            return json.loads(result.read_text())
    if process.returncode == -9:  # the kernel killed the process
        return {"error": OUT_OF_MEMORY}
    return {"error": (process.stderr.strip().splitlines() or ["no message"])[-1][:300]}


def new_report(options: argparse.Namespace) -> dict[str, Any]:
    """A report without rows: the machine, the versions and the options."""
    return {
        "machine": machine(),
        "on_gpu": torch.cuda.is_available(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "options": {name: value for name, value in vars(options).items() if name not in ("out", "row", "result")},
    }


def write(report: dict[str, Any], folder: Path, name: str, as_markdown: Callable[[dict[str, Any]], str]) -> None:
    """Write the report as `name.json` and `name.md`. Scripts call it early, so that interrupted runs leave results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / f"{name}.md").write_text(as_markdown(report))


def exit_code(rows: Iterable[Row]) -> int:
    """1 if a row failed for another reason than memory, otherwise 0."""
    return int(any(row.get("error", OUT_OF_MEMORY) != OUT_OF_MEMORY for row in rows))


def default_dtype() -> str:
    return "bfloat16" if torch.cuda.is_available() else "float32"


def machine() -> str:
    """The GPU, or the processor."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        return f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} thread(s)"


def described(report: dict[str, Any]) -> str:
    """The machine, the versions and the shape of the model, in words."""
    options = report["options"]
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    return (
        f"{report['machine']}; {versions}. Size {options['size']}"
        + (f", hidden size {options['hidden_size']}" if options["hidden_size"] else "")
        + (f", {options['layers']} layers" if options["layers"] else "")
        + f", weights in {options['dtype']}"
    )
