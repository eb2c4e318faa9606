"""`sapo-trl eval` evaluates a model on benchmarks, and `sapo-trl eval table` compares runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from trl import TrlParser

from ..short_errors import ShortErrors, hide_negations
from .settings import EvalArguments


if TYPE_CHECKING:
    from .benchmark import Benchmark


PROGRAM = "sapo-trl eval"


def main(
    argv: Sequence[str], benchmarks: Mapping[str, Benchmark] | None = None, console: Console | None = None
) -> int:
    """
    Run `sapo-trl eval`.

    Args:
        argv (`Sequence[str]`): arguments after `eval`.
        benchmarks (`Mapping[str, Benchmark]`, *optional*): by name. Defaults to this package's benchmarks.
        console ([`~rich.console.Console`], *optional*): console to print to. Defaults to the terminal.

    Returns:
        `int`: 0; 1 if the judge or the harness failed; 2 for wrong settings, rows or folders; 130 if interrupted.
    """
    console = console or Console()
    if argv[:1] == ["table"]:
        arguments = _table_parser().parse_args(list(argv[1:]))
        from .terminal import show_runs

        return show_runs(arguments.runs, arguments.format, arguments.output_dir, console)
    try:
        arguments, _ = _parser().parse_args_and_config(list(argv))
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    from .terminal import evaluate

    return evaluate(arguments, benchmarks, console)


class _Parser(ShortErrors, TrlParser):
    pass


def _parser() -> _Parser:
    parser = _Parser((EvalArguments,), prog=PROGRAM, usage=f"{PROGRAM} --config FILE [--SETTING VALUE ...]")
    # TRL takes this option out of the arguments before it parses them. Here it is for the help.
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings; the command line takes precedence")
    hide_negations(parser)
    return parser


def _table_parser() -> ShortErrors:
    parser = ShortErrors(
        prog=f"{PROGRAM} table", description="Put finished runs into one table, together with the paper's rows."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of `sapo-trl eval`")
    parser.add_argument("--format", choices=("terminal", "markdown", "latex", "json"), default="terminal")
    parser.add_argument("--output_dir", type=Path, help="folder for table.md, table.tex and table.json, too")
    return parser
