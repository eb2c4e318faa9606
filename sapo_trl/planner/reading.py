"""The setup that a run file and a command line describe."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig

from ..cli.run_arguments import parse_run
from ..cli.train import TrainArguments
from ..config import SAPOConfig
from .setup import Setup


def read_setup(arguments: argparse.Namespace, settings: Sequence[str] = ()) -> Setup:
    """
    The setup that a configuration file and the command line describe.

    Args:
        arguments (`argparse.Namespace`): of this command.
        settings (`Sequence[str]`): further arguments, as for `sapo-trl train`.

    Raises:
        ValueError: for settings that training would refuse with so many processes.
    """
    header = read_header(arguments.config)

    def machine(name: str, key: str, default: Any) -> Any:
        given = getattr(arguments, name)
        return type(default)(header.get(key, default)) if given is None else given

    processes = machine("num_processes", "processes", 1)
    args, model_args = _parse(arguments.config, settings, processes)
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set")
    sharding = machine("sharding", "sharding", "none")
    if processes == 1 and arguments.sharding is None:  # the file's sharding is for its own number of GPUs
        sharding = "none"
    image_tokens = arguments.image_tokens
    return Setup.from_args(
        args,
        model_args,
        processes=processes,
        sharding=sharding,
        gpu_memory_gib=machine("gpu_memory_gib", "gpu_memory_gib", 80.0),
        prompt_length=arguments.prompt_length,
        image_tokens=arguments.prompt_length // 2 if image_tokens is None else image_tokens,
    )


def _parse(config: Path, settings: Sequence[str], processes: int) -> tuple[SAPOConfig, ModelConfig]:
    """As `sapo-trl train` would on one of so many processes."""
    # The batch's checks depend on the number of processes, which is 1 here. One process with the batch of all
    # processes passes the same checks.
    name = "per_device_train_batch_size"
    given, rest = _taken(settings, name)
    if given is None:
        given = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get(name, 8)
    # On a CPU, because the planning machine need not be the training machine.
    arguments = ["--config", str(config), *rest, f"--{name}", str(int(given) * processes), "--use_cpu", "true"]
    request = parse_run(arguments, TrainArguments, SAPOConfig, ModelConfig, program="sapo-trl plan")
    if request.launch:
        raise ValueError(f"{request.launch[0]!r} is of `accelerate launch`; say `--num_processes` and `--sharding`.")
    _, args, model_args = request.settings
    args.per_device_train_batch_size = int(given)
    return args, model_args


def _taken(settings: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value of a setting, and the settings without it."""
    single = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    single.add_argument(f"--{name}")
    known, rest = single.parse_known_args(list(settings))
    return getattr(known, name), rest


def read_header(path: str | Path) -> dict[str, str]:
    """
    The `# name: value` comments at the top of a file.

    Args:
        path (`str` or `Path`): configuration file.

    Returns:
        `dict[str, str]`: `preset`, `accelerate`, `processes`, `sharding` and `gpu_memory_gib` in the repository's run
        files; other files may have other names.
    """
    header = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        match = re.fullmatch(r"# ([a-z_]+): (\S+)", line)
        if match is not None:
            header[match[1]] = match[2]
    return header
