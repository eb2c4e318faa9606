"""`sapo-trl view`: look at the responses of a run, or of two beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..foreign_text import visible
from ..short_errors import ShortErrors


def main(argv: Sequence[str], console: Console | None = None) -> int:
    """
    Parse `argv`, write the page, print where it is.

    Args:
        argv (`Sequence[str]`): arguments after `view`.
        console ([`~rich.console.Console`], *optional*): where to print. Defaults to the terminal.

    Returns:
        `int`: exit code: 0; arguments or files that do not fit exit with 2 and one line.
    """
    own = parser()
    arguments = own.parse_args(list(argv))
    from ..recordings.run import read_recording, run_names
    from .page import write_page

    console = console or Console()
    output = arguments.output or arguments.runs[0] / "view.html"
    try:
        if len(arguments.runs) > 2:
            raise ValueError(f"one run or two can be viewed, got {len(arguments.runs)}.")
        names = run_names(arguments.runs)
        recordings = [read_recording(run, name) for run, name in zip(arguments.runs, names, strict=True)]
        written = write_page(recordings, output, arguments.max_tokens)
    except (ValueError, OSError) as error:
        own.exit(2, f"{own.prog}: error: {visible(' '.join(str(error).split()))}\n")
    for note in written["notes"]:
        console.print(f"Note: {note}", markup=False, highlight=False)
    size = written["bytes"] / 1e6
    console.print(f"{written['responses']:,} responses, {size:.1f} MB: {output}", markup=False, soft_wrap=True)
    return 0


def parser() -> ShortErrors:
    """The command's arguments."""
    own = ShortErrors(
        prog="sapo-trl view",
        description="Write a page to look at a run: its learning curves, and its responses token by token. The file "
        "needs nothing but a browser. docs/viewer.md lists the recordings that it shows.",
    )
    own.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="folder of a run, with SegmentationCallback's files in it or below; a second run is compared with it",
    )
    own.add_argument("--output", type=Path, metavar="FILE", help="HTML file to write (RUN/view.html)")
    own.add_argument(
        "--max_tokens",
        type=int,
        metavar="N",
        default=1_200_000,
        help="thin out responses if there are more tokens (1,200,000); a million tokens take about 20 MB",
    )
    return own
