"""The `sapo-trl` command. A subcommand is imported only when it is called, and parses its own arguments."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version

import yaml

from ..names import nearest_name


# Each command's module, which has a `main(argv)`, and a line of help.
COMMANDS = {
    "demo": (".demo", "train a tiny vision-language model on a CPU and measure the gain"),
    "train": (".train_command", "train a model, with settings from a YAML file (--config) and the command line"),
    "eval": ("..evaluation.command", "evaluate a model on benchmarks, and compare the results with the paper's"),
    "view": ("..viewer.command", "write a page that shows a run's responses, token by token"),
    "analyze": ("..analysis.command", "analyze the segments of a finished run from its recordings"),
    "study": ("..study.command", "compare algorithms, with several seeds, equal budgets and equal tuning"),
    "plan": ("..planner.command", "estimate the GPU memory of a run, and suggest a change that makes it fit"),
    "presets": (".presets", "list the algorithms, or show the settings of one"),
    "configs": (".configs", "list, print or copy the run files that come with the package"),
    "env": (".environment", "print versions and devices, for a bug report"),
}

USAGE = "usage: sapo-trl COMMAND [ARGUMENTS]"


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments after the program's name. Defaults to the arguments of the process.

    Returns:
        `int`: Exit code. 0: success. 1: the command failed, or its result is negative. 2: wrong arguments. 75: a
        signal stopped training, and there is a checkpoint. 130: the user interrupted another command.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"sapo_trl {version('sapo_trl')}")
        return 0
    if argv[0] not in COMMANDS:
        near = nearest_name(argv[0], COMMANDS)
        print(f"{USAGE}\nsapo-trl: error: {argv[0]!r} is no command.{near}", file=sys.stderr)
        return 2
    # TRL's own defaults use old names of transformers. A user of this command cannot change that.
    warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
    module = importlib.import_module(COMMANDS[argv[0]][0], package=__name__)
    try:
        return module.main(argv[1:])
    except yaml.YAMLError as error:  # in any file that a command reads
        print(f"sapo-trl {argv[0]}: error: --config: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _help() -> str:
    lines = [USAGE, "", "Segment-Aligned Policy Optimization (arXiv 2605.01327) for TRL.", ""]
    lines += [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [*lines, "", "sapo-trl COMMAND --help explains a command; sapo-trl --version prints the version."]
    )
