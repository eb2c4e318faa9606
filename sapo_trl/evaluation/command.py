"""`sapo-trl eval`: benchmarks from a command line, and `sapo-trl eval table`: runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from trl import TrlParser

from .benchmark import Benchmark
from .judge import JudgeError
from .lmms_eval import HarnessError, run_harness
from .page import PAGE_NAME
from .run import results_record, run_evaluation, write_results
from .settings import EvalArguments, chosen_benchmarks
from .tables import ResultTable, as_json, as_latex, as_markdown, as_rich, make_tables, read_results, write_tables


PROGRAM = "sapo-trl eval"


def main(
    argv: Sequence[str], benchmarks: Mapping[str, Benchmark] | None = None, console: Console | None = None
) -> int:
    """
    Run `sapo-trl eval`.

    Args:
        argv (`Sequence[str]`): arguments after `eval`.
        benchmarks (`Mapping[str, Benchmark]`, *optional*): by name. Defaults to those of this package.
        console ([`~rich.console.Console`], *optional*): where to print. Defaults to the terminal.

    Returns:
        `int`: 0; 1 if the judge or the harness failed; 2 for settings, rows or a folder that do not fit; 130 if
        interrupted.
    """
    console = console or Console()
    try:
        if argv[:1] == ["table"]:
            return _table(list(argv[1:]), console)
        if benchmarks is None:
            from .benchmarks import BENCHMARKS as benchmarks
        (arguments,) = TrlParser((EvalArguments,), prog=PROGRAM).parse_args_and_config(list(argv))
        if arguments.harness == "lmms-eval":
            results = _run_harness(arguments, benchmarks)
        else:
            results = run_evaluation(arguments, benchmarks, console)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return _failed(error, 2)
    except (JudgeError, HarnessError) as error:
        return _failed(error, 1)
    except torch.OutOfMemoryError as error:
        return _failed(f"{error} A smaller `batch_size` continues the run.", 1)
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. What is generated stays; the same command continues.")
        return 130
    _show(make_tables([results]), console)
    folder = arguments.run_folder
    files = ["table.md", "table.tex", "table.json", *([PAGE_NAME] if (folder / PAGE_NAME).is_file() else [])]
    console.print(f"In {folder}: {', '.join(files)}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _run_harness(arguments: EvalArguments, benchmarks: Mapping[str, Benchmark]) -> dict:
    chosen = chosen_benchmarks(arguments.benchmarks, benchmarks)
    local = [name for name, path in chosen.items() if path]
    if local:
        raise ValueError(f"benchmarks: harness='lmms-eval' reads its own data, no paths ({', '.join(local)}).")
    found = run_harness(arguments, list(chosen))
    for name, entry in found.items():
        entry["title"] = benchmarks[name].title
    line = f"lmms-eval, temperature {arguments.temperature:g}, top-p {arguments.top_p:g}, {arguments.backend}"
    results = results_record(arguments.model, arguments.model_name, line, found)
    write_results(arguments.run_folder, results)
    return results


def _table(argv: list[str], console: Console) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} table", description="Put finished runs into one table, beside the paper's rows."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of `sapo-trl eval`")
    parser.add_argument("--format", choices=("terminal", "markdown", "latex", "json"), default="terminal")
    parser.add_argument("--output_dir", type=Path, help="also write table.md, table.tex and table.json there")
    arguments = parser.parse_args(argv)
    tables = make_tables([read_results(folder) for folder in arguments.runs])
    if arguments.output_dir:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        write_tables(arguments.output_dir, tables)
    if arguments.format == "terminal":
        _show(tables, console)
    elif arguments.format == "json":
        console.print_json(data=as_json(tables))
    else:
        text = as_markdown(tables) if arguments.format == "markdown" else as_latex(tables)
        console.out(text, highlight=False)
    return 0


def _show(tables: Sequence[ResultTable], console: Console) -> None:
    for table in tables:
        console.print(as_rich(table))
        for note in table.notes:
            console.print(f"- {note}", style="dim", markup=False, highlight=False)


def _failed(error: object, code: int) -> int:
    Console(stderr=True).print("Error:", str(error), style="red", highlight=False, markup=False, soft_wrap=True)
    return code
