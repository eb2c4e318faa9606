"""`sapo-trl plan`: does a run fit on its GPUs, and if not, which changes would make it fit?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..run_files import find_run_file
from ..short_errors import ShortErrors
from .setup import SHARDINGS


def main(argv: Sequence[str], console: Console | None = None) -> int:
    """
    Parse `argv`, plan, print.

    Args:
        argv (`Sequence[str]`): arguments after `plan`.
        console ([`~rich.console.Console`], *optional*): where to print. Defaults to the terminal.

    Returns:
        `int`: exit code: 0 if the run fits, 1 if it does not.
    """
    own = parser()
    arguments, settings = own.parse_known_args(list(argv))
    try:
        arguments.config = find_run_file(arguments.config)
    except FileNotFoundError as error:
        own.error(f"--config: {error}")
    from .memory import plan_memory
    from .reading import read_setup
    from .report import print_plan

    try:
        plan = plan_memory(read_setup(arguments, settings))
    except ValueError as error:
        own.error(str(error))
    print_plan(plan, console or Console())
    return 0 if plan.fits else 1


def parser() -> ShortErrors:
    """The command's own arguments; unknown ones are settings of the run."""
    # No abbreviations: `--num` must not be taken from the settings, which the trainer's parser knows.
    own = ShortErrors(
        prog="sapo-trl plan",
        allow_abbrev=False,
        description="Estimate the memory of a run on each GPU, from its configuration and the model's shape.",
        epilog="Any setting of `sapo-trl train` can be added, such as `--critic shared`. The file's first lines "
        "name the default machine; without them it is one GPU of 80 GiB.",
    )
    own.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="file or name, as for `sapo-trl train`"
    )
    own.add_argument("--num_processes", type=int, help="number of GPUs")
    own.add_argument("--gpu_memory_gib", type=float, help="memory of each GPU, in GiB")
    own.add_argument("--sharding", choices=SHARDINGS, help="sharding of the models; none is one GPU or DDP")
    own.add_argument("--prompt_length", type=int, default=1024, help="tokens of the longest prompt (1024)")
    own.add_argument("--image_tokens", type=int, help="image tokens among them (half)")
    return own
