"""`sapo-trl study run` and `sapo-trl study report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..foreign_text import visible
from ..short_errors import ShortErrors


def main(argv: Sequence[str]) -> int:
    """
    Run `sapo-trl study`.

    Args:
        argv (`Sequence[str]`): the arguments after `study`.

    Returns:
        `int`: 0; 1 if a run failed; 2 if the study or its folder is invalid; 130 if interrupted.
    """
    parser = ShortErrors(
        prog="sapo-trl study",
        description="Compare algorithms on the study task: several seeds, equal budgets, equal tuning, one report.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the missing runs of a study, then write its report")
    report = commands.add_parser("report", help="write the report of the finished runs")
    for command in (run, report):
        command.add_argument(
            "--config",
            type=Path,
            required=True,
            help="YAML file of the study, or a name that `sapo-trl configs` lists",
        )
        command.add_argument(
            "--output_dir", "--output-dir", type=Path, help="folder of the runs (default: outputs/study-NAME)"
        )
        command.add_argument("--report", type=Path, help="Markdown file to write (default: report.md in the folder)")
        command.add_argument("--figures", type=Path, help="folder for figures and data (default: beside the report)")
    run.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core (default: 2)")
    arguments = parser.parse_args(argv)
    from ..embedded import default_cache_dir
    from ..run_files import find_run_file
    from .config import load_study
    from .report import write_report
    from .results import load_results
    from .runner import CellFailed, run_study

    console = Console(stderr=True)
    try:
        config = find_run_file(arguments.config)
        study = load_study(config)
        output_dir = arguments.output_dir or Path("outputs") / f"study-{config.stem}"
        if arguments.command == "run":
            run_study(study, output_dir, cache_dir=default_cache_dir(), jobs=arguments.jobs, console=Console())
        path = arguments.report or output_dir / "report.md"
        write_report(study, load_results(study, output_dir), path, arguments.figures or path.parent / "figures")
    except CellFailed as error:
        print(f"sapo-trl study: error: {visible(str(error))}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"sapo-trl study: error: {visible(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("Stopped. Finished runs are kept; run the same command to continue.")
        return 130
    Console().print(f"Report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
