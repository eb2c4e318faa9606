"""`sapo-trl plan`: does a run fit on its GPUs, and if not, what would make it fit?"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from trl import ModelConfig

from ..config import SAPOConfig
from ..run_arguments import parse_run
from ..train import TrainArguments
from .advice import suggest
from .memory import ERROR_MARGIN, MemoryPlan, plan_memory
from .run_configs import read_header
from .setup import GIB, SHARDINGS, Setup


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
    if not arguments.config.is_file():
        own.error(f"there is no file {str(arguments.config)!r}")
    try:
        plan = plan_memory(read_setup(arguments, settings))
    except ValueError as error:
        own.error(str(error))
    print_plan(plan, console or Console())
    return 0 if plan.fits else 1


def parser() -> argparse.ArgumentParser:
    """The command's own arguments; what it does not know are settings of the run."""
    # No abbreviations: `--num` must not be taken from the settings, which the trainer's parser knows.
    own = argparse.ArgumentParser(
        prog="sapo-trl plan",
        allow_abbrev=False,
        description="Compute the memory a run needs on each GPU, from its configuration and the model's shape.",
        epilog="Any setting of `sapo-trl train` can be added, such as `--critic shared`. The machine's defaults are "
        "those that the file names in its first lines, otherwise one GPU of 80 GiB.",
    )
    own.add_argument("--config", type=Path, required=True, help="file for `sapo-trl train --config`")
    own.add_argument("--num_processes", type=int, help="number of GPUs")
    own.add_argument("--gpu_memory_gib", type=float, help="memory of each, in GiB")
    own.add_argument("--sharding", choices=SHARDINGS, help="none is one GPU or DDP")
    own.add_argument("--prompt_length", type=int, default=1024, help="tokens of the longest prompt (1024)")
    own.add_argument("--image_tokens", type=int, help="of these, tokens of images (half)")
    return own


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
    image_tokens = arguments.image_tokens
    return Setup.from_args(
        args,
        model_args,
        processes=processes,
        sharding=machine("sharding", "sharding", "none"),
        gpu_memory_gib=machine("gpu_memory_gib", "gpu_memory_gib", 80.0),
        prompt_length=arguments.prompt_length,
        image_tokens=arguments.prompt_length // 2 if image_tokens is None else image_tokens,
    )


def _parse(config: Path, settings: Sequence[str], processes: int) -> tuple[SAPOConfig, ModelConfig]:
    """As `sapo-trl train` would on one of so many processes."""
    # The batch's checks depend on the number of processes, which here is 1: one process with the batch of all is
    # checked alike.
    name = "per_device_train_batch_size"
    given, rest = _taken(settings, name)
    if given is None:
        given = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get(name, 8)
    # On a CPU, because the machine that plans need not be the one that trains.
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


def print_plan(plan: MemoryPlan, console: Console) -> None:
    """Print the items, the total, and what would help where it is too much."""
    setup = plan.setup
    console.print(
        f"{setup.model} on {setup.processes} x {setup.gpu_memory_gib:g} GiB, sharding {setup.sharding}; "
        f"{setup.micro_batch} x {setup.accumulation} x {setup.processes} responses per optimizer step, "
        f"{setup.mini_batches} steps per rollout; {setup.prompt_length} + {setup.completion_length} tokens"
    )
    table = Table("Memory of one GPU", "when", "GiB")
    for name, size in plan.resident.items():
        if size > 0:
            table.add_row(name, "always", _gib(size))
    for phase, items in plan.phases.items():
        for name, size in items.items():
            if size > 0:
                table.add_row(name, phase, _gib(size))
    table.add_section()
    table.add_row("total at the peak", plan.peak_phase, _gib(plan.total))
    console.print(table)
    if not math.isnan(plan.kv_cache_rows):
        console.print(
            f"vLLM's cache holds {plan.kv_cache_rows:.0f} sequences of full length per process; a rollout has "
            f"{setup.rollout_rows}, and those beyond wait."
        )
    verdict = "It fits" if plan.fits else "It does not fit"
    margin = f" That is within the estimate's error of {ERROR_MARGIN:.0%}." if plan.is_close else ""
    console.print(f"{verdict}: {_gib(plan.total)} of {setup.gpu_memory_gib:g} GiB.{margin}")
    if plan.fits:
        return
    if plan.vllm_shortage > 0:
        console.print(f"vLLM lacks {_gib(plan.vllm_shortage)} GiB inside its share for the weights and one sequence.")
    suggestions = suggest(setup)
    for suggestion in suggestions:
        fitted = _gib(plan_memory(suggestion.setup).total)
        console.print(f"It would with {' and '.join(suggestion.changes)} ({fitted} GiB).")
    if not suggestions:
        console.print("No three of the planner's changes suffice: take more or larger GPUs, or a smaller model.")


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
