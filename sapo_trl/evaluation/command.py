"""`sapo-trl eval` evaluates a model on benchmarks, and `sapo-trl eval table` compares runs."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console
from trl import TrlParser

from ..cli.help_lines import help_line, help_sections, terminal_width
from ..short_errors import ShortErrors, hide_negations
from .settings import EvalArguments


if TYPE_CHECKING:
    from .benchmark import Benchmark


PROGRAM = "sapo-trl eval"
USAGE = f"{PROGRAM} --config FILE [--SETTING VALUE ...]"

# `--help_all` shows all others, too.
MOST_USED = {
    "model and benchmarks": ("model", "benchmarks", "adapter", "limit", "max_pixels"),
    "sampling": ("backend", "temperature", "top_p", "max_new_tokens", "n", "seed", "batch_size"),
    "results": ("output_dir", "score_only"),
    "judge": ("judge_url", "judge_model", "judge_when"),
}
_HELP_ALL = "show every setting and exit"
_CONFIG_HELP = (
    "YAML file with settings; the command line takes precedence. A run file of `sapo-trl train` evaluates the run's "
    "model on its test split, with its prompts and reward functions"
)


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
        arguments, own_task = _parse(list(argv))
    except (ValueError, OSError, ImportError, yaml.YAMLError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    from .terminal import evaluate

    return evaluate(arguments, benchmarks, console, own_task)


def _parse(argv: list[str]) -> tuple[EvalArguments, Benchmark | None]:
    """The settings, and the task of a run file if `--config` names one."""
    if {"-h", "--help"} & set(argv):
        print(short_help())
        sys.exit(0)
    parser = _parser()
    path = _config(argv)
    if path is None:
        return parser.parse_args_and_config(argv)[0], None
    from .own_task import is_run_file, read_run_file

    if not is_run_file(path):
        return parser.parse_args_and_config(argv)[0], None
    own, of_training = _split(argv, {setting.name for setting in fields(EvalArguments)})
    defaults, make_task = read_run_file(path, of_training)
    if any(argument.partition("=")[0] == "--model" for argument in own):  # not the run's adapter on another model
        defaults = {name: value for name, value in defaults.items() if name not in ("adapter", "revision")}
    parser.set_defaults(**defaults)
    arguments, *_ = parser.parse_args_into_dataclasses(args=own)
    return arguments, make_task(arguments)


def _config(argv: Sequence[str]) -> str | None:
    """The file of `--config`, if there is one."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--config")
    return options.parse_known_args(list(argv))[0].config


def _split(argv: Sequence[str], known: set[str]) -> tuple[list[str], list[str]]:
    """The arguments that are settings of the evaluation, and all others without `--config`."""
    own: list[str] = []
    others: list[str] = []
    taken_by, config = others, []
    for argument in argv:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            is_known = name in known or name.removeprefix("no_") in known
            taken_by = config if name == "config" else own if is_known else others
        taken_by.append(argument)
    return own, others


class _Parser(ShortErrors, TrlParser):
    pass


def _parser() -> _Parser:
    parser = _Parser((EvalArguments,), prog=PROGRAM, usage=USAGE, add_help=False)
    # TRL takes `--config` out of the arguments before it parses them. Here it is for the help.
    parser.add_argument("--config", metavar="FILE", help=_CONFIG_HELP)
    parser.add_argument("--help_all", action="help", help=_HELP_ALL)
    hide_negations(parser)
    return parser


def short_help() -> str:
    """Help on the most used settings, as wide as the terminal."""
    width = terminal_width()
    options = {
        "--config FILE": _CONFIG_HELP,
        "--help": "show the most used settings and exit",
        "--help_all": _HELP_ALL,
    }
    lines = [
        f"usage: {USAGE}",
        f"       {PROGRAM} table RUN [RUN ...]",
        "",
        *textwrap.wrap(
            "Evaluate a model on benchmarks, or on the test split of a run file. `table` puts finished runs side by "
            "side.",
            width,
        ),
        "",
        *(help_line(option, text, width) for option, text in options.items()),
    ]
    return "\n".join([*lines, *help_sections(MOST_USED, EvalArguments, width=width)])


def _table_parser() -> ShortErrors:
    parser = ShortErrors(
        prog=f"{PROGRAM} table", description="Put finished runs into one table, together with the paper's rows."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of `sapo-trl eval`")
    parser.add_argument("--format", choices=("terminal", "markdown", "latex", "json"), default="terminal")
    parser.add_argument("--output_dir", type=Path, help="folder for table.md, table.tex and table.json, too")
    return parser
