"""Starts a run's processes through accelerate, passes signals on to them, and returns their exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import psutil
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..callbacks.stop_on_signal import EXIT_CODE


PROCESSES_VARIABLE = "SAPO_TRL_NUM_PROCESSES"
"""Environment variable with the requested number of processes. The launched processes compare it with their number."""


def launch(options: Sequence[str], command: Sequence[str]) -> int:
    """
    Run a command of this package in processes started by `accelerate launch`.

    Args:
        options (`Sequence[str]`): options of `accelerate launch`.
        command (`Sequence[str]`): the arguments of `sapo-trl`.

    Returns:
        `int`: the exit code of the first failed process, or 0.
    """
    arguments = launch_command_parser().parse_args([*options, "-m", "sapo_trl.cli", *command])
    if (processes := _requested_processes(arguments)) is not None:
        os.environ[PROCESSES_VARIABLE] = str(processes)
    # Accelerate passes this option to torch's launcher. We handle SIGINT and SIGTERM ourselves, see below.
    arguments.signals_to_handle = "SIGHUP,SIGQUIT"
    try:
        with _signals_handed_on():
            launch_command(arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        code = error.returncode
    else:
        return 0
    if code != EXIT_CODE:
        print(f"sapo-trl: a process ended with exit code {code}. Its output tells why.", file=sys.stderr)
    return code if code > 0 else 1


def check_launched(processes: int) -> None:
    """
    Raise `ValueError` if fewer processes run than requested. Some launchers start only one process, without a message.

    Args:
        processes (`int`): the number of running processes.
    """
    requested = os.environ.get(PROCESSES_VARIABLE)
    if requested is not None and int(requested) != processes:
        raise ValueError(
            f"{requested} processes were requested, but accelerate has started {processes}. On CPUs it starts several "
            "processes only with `distributed_type: MULTI_GPU` and `use_cpu: true` in --accelerate_config."
        )


def _requested_processes(arguments) -> int | None:
    if arguments.num_processes is not None:
        return arguments.num_processes
    if arguments.config_file is not None:
        return load_config_from_file(arguments.config_file).num_processes
    return None


@contextlib.contextmanager
def _signals_handed_on() -> Iterator[None]:
    """
    Pass SIGINT and SIGTERM on to the launched processes. They finish their step and save, and the launcher waits.

    Torch's launcher would kill the processes 30 s after a signal, in the middle of a step or of a checkpoint.
    """

    def hand_on(number: int, _) -> None:
        for process in psutil.Process().children():
            with contextlib.suppress(ProcessLookupError):
                # The terminal sends Ctrl-C to all processes of its own group. A second SIGINT would end them at once.
                if number != signal.SIGINT or os.getpgid(process.pid) != os.getpgrp():
                    os.kill(process.pid, number)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
