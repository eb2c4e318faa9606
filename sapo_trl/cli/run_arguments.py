"""The arguments of `sapo-trl train`: a YAML file, a preset that replaces the file's algorithm, and single settings."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from trl import TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from ..names import nearest_name
from ..presets import AXES, RUN_SETTINGS, preset_settings
from ..run_files import find_run_file, run_file_names
from ..short_errors import ShortErrors, hide_negations
from .help_lines import help_line, help_sections


PROGRAM = "sapo-trl train"

# The most used settings. `--help_all` shows all others, including some 200 settings of TRL and transformers.
MOST_USED = {
    "algorithm": (
        "segmentation",
        "top_percent",
        "critic",
        "critic_learning_rate",
        "critic_warmup_steps",
        "advantage_estimator",
        "gamma",
        "lam",
        "critic_lam",
        "whiten_advantages",
        "importance_sampling_level",
        "loss_type",
        "beta",
        "num_mini_batches",
    ),
    "training": (
        "output_dir",
        "learning_rate",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_generations",
        "max_completion_length",
        "temperature",
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
    ),
    "model": (
        "model_name_or_path",
        "dtype",
        "attn_implementation",
        "use_peft",
        "lora_r",
        "lora_target_modules",
        "load_in_4bit",
    ),
}


class _Parser(ShortErrors, TrlParser):
    pass


@dataclass(frozen=True)
class RunRequest:
    """
    The parsed command line.

    Args:
        settings (`tuple`): instances of the data classes, in their order; empty if processes will be launched.
        dry_run (`bool`): whether to stop before training.
        launch (`list[str]`): arguments of `accelerate launch`; empty to run in this process.
        arguments (`list[str]`): all other arguments, for the launched processes.
        chosen (`dict[str, dict[str, Any]]`): the user's settings by source, each at the source that decides.
        replaced (`dict[str, Any]`): settings that a dry run without an accelerator has replaced.
        lost (`dict[str, tuple[Any, Any]]`): the file's value and the run's value of each setting that `--preset` has
            changed.
    """

    settings: tuple[Any, ...]
    dry_run: bool
    launch: list[str]
    arguments: list[str]
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)
    lost: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def chosen_names(self) -> set[str]:
        """Names of all settings that the user has chosen."""
        return {name for settings in self.chosen.values() for name in settings}

    def lost_line(self) -> str | None:
        """A line on the file's settings that `--preset` has changed; `None` if there are none."""
        changes = [f"{name}: {_as_text(old)} → {_as_text(new)}" for name, (old, new) in self.lost.items()]
        return f"From the file, replaced by the preset: {', '.join(changes)}" if changes else None


def parse_run(argv: Sequence[str], *dataclasses: type, program: str = PROGRAM) -> RunRequest:
    """
    Parse a command line. A mistake ends the program with a message and exit code 2.

    Single settings override the preset, and the preset of the command line overrides the file. It replaces the file's
    whole algorithm: a setting of [`~sapo_trl.presets.AXES`] has this preset's value, or the default. If the file
    itself names a preset, the file's own settings override its preset.

    Args:
        argv (`Sequence[str]`): arguments, with `--config FILE`, `--preset NAME`, `--dry_run`, `--accelerate_config`.
        dataclasses (`type`): the classes of the settings.
        program (`str`, *optional*, defaults to `"sapo-trl train"`): the program's name in messages.

    Returns:
        [`RunRequest`]
    """
    own = _own_options()
    options, rest = own.parse_known_args(list(argv))
    parser = _Parser(dataclasses, prog=program, add_help=False, allow_abbrev=False)
    hide_negations(parser)
    known = {field.name for kind in dataclasses for field in fields(kind) if field.init}
    if options.help or options.help_all:
        print(short_help(*dataclasses) if options.help else f"{own.format_help()}\n{parser.format_help()}")
        sys.exit(0)
    settings = _file_settings(options.config, known, parser)
    of_file = dict(settings)
    replaced: dict[str, Any] = {}
    try:
        sources = _with_preset(settings, options.preset)
        rest, launch = _launch_arguments(rest, known, options.accelerate_config)
        chosen = _deciding({**sources, "command line": _named_values(rest, known)})
        parser.set_defaults_with_config(**{k: v for source in sources.values() for k, v in source.items()})
        changed = []
        if options.dry_run:
            everything = {k: v for source in chosen.values() for k, v in source.items()}
            if not torch.accelerator.is_available() and everything.get("use_cpu") is not True:
                replaced = _for_cpu(everything)
            changed = _as_arguments({name: v for name, v in {**replaced, **_WITHOUT_TRACES}.items() if name in known})
        parsed = () if launch else parser.parse_args_into_dataclasses(args=[*rest, *changed])
    except ValueError as error:  # also from the data classes' own checks
        _fail(parser, str(error))
    arguments = ["--config", str(options.config)] if options.config else []
    arguments += ["--preset", options.preset] if options.preset else []
    arguments += ["--dry_run"] if options.dry_run else []
    lost = _lost(of_file, options.preset, chosen, parsed)
    return RunRequest(parsed, options.dry_run, launch, [*arguments, *rest], chosen, replaced, lost)


def _own_options() -> argparse.ArgumentParser:
    options = ShortErrors(prog=PROGRAM, add_help=False, allow_abbrev=False)
    group = options.add_argument_group("the run")
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file with settings, a `preset` and `env` variables, or a name that `sapo-trl configs` lists",
    )
    group.add_argument(
        "--preset", metavar="NAME", help="use this algorithm instead of the file's (list: `sapo-trl presets`)"
    )
    group.add_argument("--dry_run", action="store_true", help="load everything, show the planned run, and stop")
    group.add_argument(
        "--accelerate_config",
        metavar="FILE",
        help="start processes with this config file of accelerate: a path, one of TRL's names such as zero2, or a "
        "name that `sapo-trl configs` lists. Options of `accelerate launch`, such as --num_processes, start "
        "processes, too",
    )
    group.add_argument("-h", "--help", action="store_true", help="show the most used settings and exit")
    group.add_argument(
        "--help_all", action="store_true", help="show every setting, also TRL's and transformers', and exit"
    )
    return options


def _file_settings(path: Path | None, known: set[str], parser: TrlParser) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        path = find_run_file(path)
        settings = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        _fail(parser, f"--config: {error}")
    if not isinstance(settings, dict):
        _fail(parser, f"--config: {str(path)!r} must map names to settings, got {type(settings).__name__}.")
    for name, value in (settings.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    for name in settings:
        if name not in known | {"preset"}:
            _fail(parser, f"--config: {name!r} in {str(path)!r} is no setting.{nearest_name(name, known)}")
    return settings


def _with_preset(settings: dict[str, Any], preset: str | None) -> dict[str, dict[str, Any]]:
    """The settings of the file and of the preset by source; later sources come before earlier ones."""
    of_file = settings.pop("preset", None)
    if preset is None:
        own = {} if of_file is None else {f"preset {of_file}": preset_settings(of_file)}
        return {**own, "file": settings}
    decided = {name for names in AXES.values() for name in names} - RUN_SETTINGS
    others = {name: value for name, value in settings.items() if name not in decided}
    return {"file": others, f"preset {preset}": preset_settings(preset)}


def _lost(
    of_file: Mapping[str, Any],
    preset: str | None,
    chosen: Mapping[str, Mapping[str, Any]],
    parsed: Sequence[Any],
) -> dict[str, tuple[Any, Any]]:
    """The file's settings to which `preset` gives another value, with both values."""
    if preset is None:
        return {}
    values = {"preset": preset, **{name: value for part in parsed for name, value in vars(part).items()}}
    of_preset = {**values, **preset_settings(preset)}
    dropped = [name for name in of_file if name in values]
    dropped = [name for name in dropped if name not in chosen["file"] and name not in chosen["command line"]]
    # `SAPOConfig` may keep a value in another form, as with `scale_rewards: false`.
    return {
        name: (of_file[name], values[name])
        for name in dropped
        if not _same(of_file[name], values[name]) and not _same(of_file[name], of_preset[name])
    }


def _same(written: Any, value: Any) -> bool:
    """Whether a value in a YAML file is `value`. YAML takes `1e-6` for a text."""
    try:
        return written == value or float(written) == value
    except (TypeError, ValueError):
        return False


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _deciding(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each setting only at the last source that has it."""
    last = {name: source for source, settings in sources.items() for name in settings}
    return {
        source: {name: value for name, value in settings.items() if last[name] == source}
        for source, settings in sources.items()
    }


def _named_values(arguments: Sequence[str], known: set[str]) -> dict[str, Any]:
    """The settings of a command line by name. Values are read as in a YAML file."""
    texts: dict[str, list[str]] = {}
    values: list[str] = []
    for argument in arguments:
        if not argument.startswith("--"):
            values.append(argument)
            continue
        name, has_value, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        values = [value] if has_value else []
        if name not in known and name.removeprefix("no_") in known:
            name, values = name.removeprefix("no_"), ["false"]
        texts[name] = values
    return {name: _value(texts) for name, texts in texts.items()}


def _value(texts: list[str]) -> Any:
    """A flag without a value is true, and several values are a list."""
    try:
        read = [yaml.safe_load(text) for text in texts]
    except yaml.YAMLError:
        read = list(texts)
    return True if not read else read[0] if len(read) == 1 else read


# A dry run leaves nothing behind: neither a run on a tracker nor a repository.
_WITHOUT_TRACES = {"report_to": "none", "push_to_hub": False}

_ON_CPU = {
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "use_vllm": False,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "dtype": "float32",
}


def _for_cpu(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with which a run for GPUs is tried on a CPU."""
    replaced = dict(_ON_CPU)
    if "flash" in str(chosen.get("attn_implementation")):
        replaced["attn_implementation"] = "eager"
    if any(part in str(chosen.get("optim")) for part in ("8bit", "4bit", "paged")):
        replaced["optim"] = "adamw_torch"
    for name in ("tf32", "bf16_full_eval", "fp16_full_eval", "torch_compile"):
        if chosen.get(name):
            replaced[name] = False
    return replaced


def _as_arguments(settings: Mapping[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def _launch_arguments(
    rest: Sequence[str], known: set[str], accelerate_config: str | None
) -> tuple[list[str], list[str]]:
    """
    Two lists: arguments that are settings, and arguments of `accelerate launch`. The launched processes get only the
    settings.
    """
    of_accelerate = set(vars(launch_command_parser().parse_args(["script"])))
    settings: list[str] = []
    launch = [] if accelerate_config is None else ["--accelerate_config", _accelerate_config(accelerate_config)]
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


def _accelerate_config(name: str) -> str:
    """A path, or one of TRL's names, as it is; one of ours as its path."""
    return str(find_run_file(name)) if name in run_file_names() else name


def short_help(*dataclasses: type) -> str:
    """
    Help on the most used settings, with a line or two for each setting.

    Args:
        dataclasses (`type`): the classes of the settings. All fields of the first class are shown.
    """
    sections = {"data and rewards": [field.name for field in fields(dataclasses[0]) if field.init], **MOST_USED}
    lines = [
        f"usage: {PROGRAM} --config FILE [--SETTING VALUE ...]",
        "",
        "Train a model. Settings come from a YAML file and from the command line, which takes precedence.",
        "",
        *(
            help_line(" ".join(filter(None, (action.option_strings[-1], action.metavar))), action.help)
            for action in _own_options()._actions
        ),
    ]
    return "\n".join([*lines, *help_sections(sections, *dataclasses)])


def _fail(parser: TrlParser, message: str) -> NoReturn:
    print(f"{parser.prog}: error: {message}", file=sys.stderr)
    sys.exit(2)
