"""Runs an evaluation from the terminal and prints its tables. A failure becomes one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from ..foreign_text import visible
from .benchmark import Benchmark
from .judge import JudgeError
from .lmms_eval import HarnessError, run_harness
from .page import PAGE_NAME
from .run import results_record, run_evaluation, write_results
from .settings import EvalArguments, chosen_benchmarks
from .tables import ResultTable, as_json, as_latex, as_markdown, as_rich, make_tables, read_results, write_tables


def evaluate(
    arguments: EvalArguments,
    benchmarks: Mapping[str, Benchmark] | None,
    console: Console,
    own_task: Benchmark | None = None,
) -> int:
    """
    Evaluate, score and write tables. Returns the exit code of `sapo-trl eval`.

    Args:
        arguments ([`EvalArguments`]): the settings.
        benchmarks (`Mapping[str, Benchmark]`, *optional*): by name. Defaults to the benchmarks of this package.
        console ([`~rich.console.Console`]): console to print to.
        own_task ([`Benchmark`], *optional*): the task of a run file, beside the benchmarks.
    """
    try:
        if benchmarks is None:
            from .benchmarks import BENCHMARKS as benchmarks
        if own_task is not None:
            benchmarks = {own_task.name: own_task, **benchmarks}
        if arguments.harness == "lmms-eval":
            results = _run_harness(arguments, benchmarks)
        else:
            results = run_evaluation(arguments, benchmarks, console)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return _failed(error, 2)
    except (JudgeError, HarnessError) as error:
        return _failed(error, 1)
    except torch.OutOfMemoryError as error:
        return _failed(f"{error} You can continue the run with a smaller `batch_size`.", 1)
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. All generations are saved; the same command continues the run.")
        return 130
    _show(make_tables([results]), console)
    folder = arguments.run_folder
    files = ["table.md", "table.tex", "table.json", *([PAGE_NAME] if (folder / PAGE_NAME).is_file() else [])]
    console.print(f"In {folder}: {', '.join(files)}", soft_wrap=True, highlight=False, markup=False)
    return 0


def show_runs(runs: Sequence[Path], format: str, output_dir: Path | None, console: Console) -> int:
    """
    Print the tables of finished runs. Returns the exit code.

    Args:
        runs (`Sequence[Path]`): folders of `sapo-trl eval`.
        format (`str`): `"terminal"`, `"markdown"`, `"latex"` or `"json"`.
        output_dir (`Path`, *optional*): folder in which the tables are also written.
        console ([`~rich.console.Console`]): console to print to.
    """
    try:
        tables = make_tables([read_results(folder) for folder in runs])
        if output_dir:
            output_dir.mkdir(parents=True, exist_ok=True)
            write_tables(output_dir, tables)
    except (ValueError, OSError) as error:
        return _failed(error, 2)
    if format == "terminal":
        _show(tables, console)
    elif format == "json":
        console.print_json(data=as_json(tables))
    else:
        text = as_markdown(tables) if format == "markdown" else as_latex(tables)
        console.out(text, highlight=False)
    return 0


def _run_harness(arguments: EvalArguments, benchmarks: Mapping[str, Benchmark]) -> dict:
    chosen = chosen_benchmarks(arguments.benchmarks, benchmarks)
    local = [name for name, path in chosen.items() if path]
    if local:
        raise ValueError(f"benchmarks: harness='lmms-eval' reads its own data, not paths ({', '.join(local)}).")
    found = run_harness(arguments, list(chosen))
    for name, entry in found.items():
        entry["title"] = benchmarks[name].title
    line = f"lmms-eval, temperature {arguments.temperature:g}, top-p {arguments.top_p:g}, {arguments.backend}"
    results = results_record(arguments.model, arguments.model_name, line, found)
    write_results(arguments.run_folder, results)
    return results


def _show(tables: Sequence[ResultTable], console: Console) -> None:
    for table in tables:
        console.print(as_rich(table, console.width))
        for note in table.notes:
            console.print(f"- {note}", style="dim", markup=False, highlight=False)


def _failed(error: object, code: int) -> int:
    print(f"sapo-trl eval: error: {visible(str(error))}", file=sys.stderr)
    return code
