"""Starts a run's processes through accelerate, hands signals on to them, and tells how they ended."""

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

from ..stop_on_signal import EXIT_CODE


PROCESSES_VARIABLE = "SAPO_TRL_NUM_PROCESSES"
"""Environment variable in which the launched processes find how many they should be."""


def launch(options: Sequence[str], command: Sequence[str]) -> int:
    """
    Run a command of this package in the processes that `accelerate launch` starts.

    Args:
        options (`Sequence[str]`): of `accelerate launch`.
        command (`Sequence[str]`): the arguments of `sapo-trl`.

    Returns:
        `int`: exit code of the command: that of the first process that failed, or 0.
    """
    arguments = launch_command_parser().parse_args([*options, "-m", "sapo_trl.cli", *command])
    if (processes := _requested_processes(arguments)) is not None:
        os.environ[PROCESSES_VARIABLE] = str(processes)
    # An option of torch's launcher, to which accelerate hands it: SIGINT and SIGTERM are ours, see below.
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
        print(f"sapo-trl: a process ended with exit code {code}; what it printed says why.", file=sys.stderr)
    return code if code > 0 else 1


def check_launched(processes: int) -> None:
    """
    Raise `ValueError` if there are fewer processes than were asked for: some launchers start one and say nothing.

    Args:
        processes (`int`): how many there are.
    """
    requested = os.environ.get(PROCESSES_VARIABLE)
    if requested is not None and int(requested) != processes:
        raise ValueError(
            f"{requested} processes were asked for, but accelerate has started {processes}. On CPUs it starts several "
            "only with `distributed_type: MULTI_GPU` and `use_cpu: true` in --accelerate_config."
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
    SIGINT and SIGTERM go to the launched processes, which end their step and save; the launcher waits for them.

    torch's launcher would kill them 30 s after a signal, in the middle of a step or of a checkpoint.
    """

    def hand_on(number: int, _) -> None:
        for process in psutil.Process().children():
            with contextlib.suppress(ProcessLookupError):
                # The terminal has sent Ctrl-C to those of its own group; a second one would end them at once.
                if number != signal.SIGINT or os.getpgid(process.pid) != os.getpgrp():
                    os.kill(process.pid, number)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
