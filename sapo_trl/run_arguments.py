"""The arguments of `sapo-trl train`: a YAML file, a preset in the place of its algorithm, and single settings."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from accelerate.commands.launch import launch_command_parser
from trl import GRPOConfig, ModelConfig, TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from .config import SAPOConfig
from .presets import PRESETS, preset_settings
from .validation import nearest_name


PROGRAM = "sapo-trl train"

# Of some 200 settings of TRL and transformers, those that most runs set: the others are in `--help_all`.
COMMON_SETTINGS = (
    "output_dir",
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "max_completion_length",
    "temperature",
    "beta",
    "loss_type",
    "use_vllm",
    "vllm_mode",
    "bf16",
    "gradient_checkpointing",
    "eval_strategy",
    "save_steps",
    "logging_steps",
    "report_to",
    "resume_from_checkpoint",
    "push_to_hub",
    "seed",
)


@dataclass(frozen=True)
class RunRequest:
    """
    What the command line asks for.

    Args:
        settings (`tuple`): instances of the data classes, in their order; none if processes are to be launched.
        dry_run (`bool`): whether to stop before training.
        launch (`list[str]`): arguments of `accelerate launch`; empty to run in this process.
        arguments (`list[str]`): the command line without these, for the processes that are launched.
    """

    settings: tuple[Any, ...]
    dry_run: bool
    launch: list[str]
    arguments: list[str]


def parse_run(argv: Sequence[str], *dataclasses: type, program: str = PROGRAM) -> RunRequest:
    """
    Parse a command line. What is wrong with it ends the program with exit code 2 and a message.

    Single settings come before the preset, the preset before the file. A preset given on the command line replaces
    the file's algorithm: every setting that any preset decides is the preset's, or the default. A preset that the file
    names is what the file's own settings change.

    Args:
        argv (`Sequence[str]`): arguments, with `--config FILE`, `--preset NAME`, `--dry_run`, `--accelerate_config`.
        dataclasses (`type`): what the settings belong to.
        program (`str`, *optional*, defaults to `"sapo-trl train"`): what messages begin with.

    Returns:
        [`RunRequest`]
    """
    own = _own_options()
    options, rest = own.parse_known_args(list(argv))
    parser = TrlParser(dataclasses, prog=program, add_help=False, allow_abbrev=False)
    known = {field.name for kind in dataclasses for field in fields(kind) if field.init}
    if options.help or options.help_all:
        _print_help(own, parser, dataclasses, everything=options.help_all)
        sys.exit(0)
    settings = _file_settings(options.config, known, parser)
    try:
        settings = _with_preset(settings, options.preset)
        rest, launch = _launch_arguments(rest, known, options.accelerate_config)
        parser.set_defaults_with_config(**settings)
        parsed = () if launch else parser.parse_args_into_dataclasses(args=rest)
    except ValueError as error:  # of the data classes' own checks, too
        _fail(parser, str(error))
    arguments = ["--config", str(options.config)] if options.config else []
    arguments += ["--preset", options.preset] if options.preset else []
    arguments += ["--dry_run"] if options.dry_run else []
    return RunRequest(parsed, options.dry_run, launch, [*arguments, *rest])


def _own_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    group = options.add_argument_group("the run")
    group.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of settings, a `preset`, `env` variables"
    )
    group.add_argument("--preset", metavar="NAME", help="algorithm in the place of the file's: `sapo-trl presets`")
    group.add_argument("--dry_run", action="store_true", help="load everything, show what would be done, and stop")
    group.add_argument(
        "--accelerate_config",
        metavar="FILE",
        help="launch processes as this file of accelerate's says (a path, or a name of TRL's such as zero2); options "
        "of `accelerate launch` such as --num_processes do so, too",
    )
    group.add_argument("-h", "--help", action="store_true", help="show this and exit")
    group.add_argument("--help_all", action="store_true", help="the same with every setting of TRL and transformers")
    return options


def _file_settings(path: Path | None, known: set[str], parser: TrlParser) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        _fail(parser, f"--config: {error}")
    if not isinstance(settings, dict):
        _fail(parser, f"--config: {str(path)!r} must hold settings with their names, got {type(settings).__name__}.")
    for name, value in (settings.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    for name in settings:
        if name not in known | {"preset"}:
            _fail(parser, f"--config: {name!r} in {str(path)!r} is no setting.{nearest_name(name, known)}")
    return settings


def _with_preset(settings: dict[str, Any], preset: str | None) -> dict[str, Any]:
    of_file = settings.pop("preset", None)
    if preset is None:
        return settings if of_file is None else {**preset_settings(of_file), **settings}
    decided = {name for known in PRESETS.values() for name in known.settings}
    others = {name: value for name, value in settings.items() if name not in decided}
    return {**others, **preset_settings(preset)}


def _launch_arguments(
    rest: Sequence[str], known: set[str], accelerate_config: str | None
) -> tuple[list[str], list[str]]:
    """Apart: arguments that are settings, and those of `accelerate launch`, which the launched processes lack."""
    of_accelerate = set(vars(launch_command_parser().parse_args(["script"])))
    settings: list[str] = []
    launch = [] if accelerate_config is None else ["--accelerate_config", accelerate_config]
    taken_by = settings
    for argument in rest:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            if name in known or name.removeprefix("no_") in known:
                taken_by = settings
            elif name in of_accelerate:
                taken_by = launch
            else:
                raise ValueError(f"{argument!r} is no setting.{nearest_name(name, known | of_accelerate)}")
        taken_by.append(argument)
    return settings, resolve_accelerate_config_argument(launch)


def _print_help(
    own: argparse.ArgumentParser, parser: TrlParser, dataclasses: Sequence[type], everything: bool
) -> None:
    print("Train a model; settings come from a YAML file and from the command line, which takes precedence.\n")
    own.print_help()
    if everything:
        print(parser.format_help())
        return
    ours = [field.name for field in fields(SAPOConfig) if field.name not in {f.name for f in fields(GRPOConfig)}]
    for kind in dataclasses:
        if kind is SAPOConfig:
            print(_help_of(kind, ours, "segments, critic, advantages and losses (SAPOConfig)"))
            print(_help_of(kind, COMMON_SETTINGS, "most used of TRL's and transformers' (all: --help_all)"))
        else:
            title = "the model (TRL's ModelConfig)" if kind is ModelConfig else "data and rewards"
            print(_help_of(kind, [field.name for field in fields(kind) if field.init], title))


def _help_of(kind: type, names: Sequence[str], title: str) -> str:
    """The help of some fields of a data class."""
    hints = get_type_hints(kind)
    by_name = {field.name: field for field in fields(kind)}
    part = make_dataclass(kind.__name__, [(name, hints[name], by_name[name]) for name in names])
    part._argument_group_name = title
    text = TrlParser([part], prog=PROGRAM, add_help=False).format_help()
    return text[text.index(title) :]


def _fail(parser: TrlParser, message: str) -> NoReturn:
    print(f"{parser.prog}: error: {message}", file=sys.stderr)
    sys.exit(2)
