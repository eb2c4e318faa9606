"""Runs a study's cells, a few at a time, each in a separate process. Finished cells are never run again."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import statistics
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..files import write_text
from ..folder_lock import locked
from .cells import CELL_NAME, RESULT_NAME, Cell, Choice, comparison_cells, result_of, tuning_cells
from .code import code_fingerprint
from .config import StudyConfig
from .preregistration import freeze
from .run_cell import be_quiet_and_small, cell_config, run_cell_process
from .task.warm_start import warm_start, warm_start_folder
from .tuning import chosen_settings


LOG_NAME = "log.txt"
CELLS_FOLDER = "cells"
_POLL_SECONDS = 0.2


class CellFailed(RuntimeError):
    """A cell's process has ended without a result."""


@dataclass
class _Running:
    cell: Cell
    process: ForkServerProcess
    started: float
    alive: Connection
    """Closed when this process ends for any reason. This ends the cell, too."""


def run_study(
    study: StudyConfig,
    output_dir: str | Path,
    *,
    cache_dir: str | Path,
    jobs: int = 2,
    console: Console | None = None,
) -> None:
    """
    Run the missing runs of a study: warm starts, tuning, then the comparisons with the tuned settings.

    Args:
        study ([`StudyConfig`]):
            The study.
        output_dir (`str` or `Path`):
            Its folder, with a subfolder for each cell.
        cache_dir (`str` or `Path`):
            Folder of finished warm starts.
        jobs (`int`, *optional*, defaults to `2`):
            Cells that run at the same time.
        console ([`~rich.console.Console`], *optional*):
            Console for the progress display.

    Raises:
        CellFailed: if a cell fails. Other running cells are completed first, and finished runs are kept.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1.")
    cells_dir = Path(output_dir) / CELLS_FOLDER
    cells_dir.mkdir(parents=True, exist_ok=True)
    with locked(output_dir, "runs a study"):
        freeze(study, output_dir)
        _run(study, cells_dir, cache_dir, jobs, console or Console())


def _run(study: StudyConfig, cells_dir: Path, cache_dir: str | Path, jobs: int, console: Console) -> None:
    tuning = tuning_cells(study)
    # The tuned settings do not change the number of runs, and hardly change their time.
    guess = dict.fromkeys([cell.arm_name for cell in tuning], Choice(study.tuning.learning_rate[0], {}))
    expected = [*tuning, *comparison_cells(study, guess)]
    _check_settings(expected, cells_dir)
    console.print(estimate(study, expected, cells_dir, cache_dir, jobs), soft_wrap=True, markup=False, highlight=False)
    _say_other_code(cells_dir, console)
    processes = _process_context()
    with Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[news]}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        _make_warm_starts(processes, expected, cache_dir, jobs, progress)
        show = _Progress(progress, len(expected), jobs, cells_dir)
        _say_what_is_unused(tuning, cells_dir, console)
        _run_cells(processes, tuning, cells_dir, cache_dir, jobs, show, later=expected[len(tuning) :])
        choices = {name: arm.choices for name, arm in study.arms.items()}
        chosen = chosen_settings(((cell, result_of(cells_dir / cell.name)) for cell in tuning), choices)
        compared = comparison_cells(study, chosen)
        _say_what_is_unused(compared, cells_dir, console)
        _run_cells(processes, compared, cells_dir, cache_dir, jobs, show, later=[])


def estimate(study: StudyConfig, cells: list[Cell], cells_dir: Path, cache_dir: str | Path, jobs: int) -> str:
    """
    How long a study's missing runs take, from the `seconds` in its file.

    Args:
        study ([`StudyConfig`]): the study.
        cells (`list[Cell]`): all its runs. Tuned settings may still be a guess, so finished runs are counted by name
            and seed alone.
        cells_dir (`Path`): folder of its runs.
        cache_dir (`str` or `Path`): folder of finished warm starts.
        jobs (`int`): runs at a time.

    Returns:
        `str`: a sentence.
    """

    def known(name: str) -> str:
        return name.rpartition("-lr")[0]

    folders = [folder.name for folder in cells_dir.iterdir() if (folder / RESULT_NAME).is_file()]
    # A tuning run's rate is known; a comparison's is a guess until the tuning is finished.
    finished, likely = set(folders), {known(name) for name in folders}
    missing = [c for c in cells if c.name not in finished and (c.split == "tune" or known(c.name) not in likely)]
    policies = {c.policy: None for c in missing}
    starts = sum(not warm_start_folder(cache_dir, policy).exists() for policy in policies)
    text = f"{len(cells)} runs, {len(cells) - len(missing)} of them finished, and {starts} warm starts to make."
    if not study.seconds or not missing:
        return text
    other = study.seconds.get("other", 0.0)
    seconds = sum(study.seconds.get(cell.arm_name, other) for cell in missing)
    seconds += starts * study.seconds.get("warm_start", 0.0)
    hours = seconds / 3600
    return (
        f"{text} By the seconds in the study's file this takes {hours:.1f} core-hours, {hours / jobs:.1f} hours here."
    )


def _say_other_code(cells_dir: Path, console: Console) -> None:
    found = set()
    for folder in sorted(cells_dir.iterdir()):
        with contextlib.suppress(ValueError):  # a result of another version is no run of this study
            result = result_of(folder)
            found |= {result["environment"].get("code")} if result is not None else set()
    others = found - {code_fingerprint()}
    if others:
        console.print(
            f"Some finished runs in {cells_dir} were made by other code than this ({code_fingerprint()}): "
            f"{', '.join(sorted(map(str, others)))}. They are used. For runs of one code, begin in an empty folder.",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


def unused_runs(cells: list[Cell], cells_dir: Path) -> list[str]:
    """
    Names of the finished runs that differ from these cells only in the fingerprint. The study will run these cells
    again, and the user should know that the old runs are not lost.
    """
    names = {cell.name for cell in cells}
    like = {cell.unmarked_name for cell in cells}
    return [
        folder.name
        for folder in sorted(cells_dir.iterdir())
        if folder.name not in names and folder.name.rpartition("-")[0] in like and (folder / RESULT_NAME).is_file()
    ]


def _say_what_is_unused(cells: list[Cell], cells_dir: Path, console: Console) -> None:
    unused = unused_runs(cells, cells_dir)
    if unused:
        console.print(
            f"{len(unused)} finished runs in {cells_dir} are not used and not touched, for example {unused[0]}. They "
            "were made with other settings, another version of the task's code, or other versions of its libraries.",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


def _process_context() -> ForkServerContext:
    """A context for processes with all modules imported already. The imports take as long as a quarter of a run."""
    # Several cells share the machine: with more than one thread each, they wait for one another.
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run_cell_process.__module__])
    return context


def _check_settings(cells: list[Cell], folder: Path) -> None:
    """Check every arm's settings before hours are spent on other arms."""
    for cell in {(cell.arm_name, cell.task_name, cell.measure): cell for cell in cells}.values():
        try:
            cell_config(cell, folder)
        except (TypeError, ValueError) as error:
            raise ValueError(f"arms.{cell.arm_name}: {error}") from error


def _make_warm_starts(
    processes: ForkServerContext, cells: list[Cell], cache_dir: str | Path, jobs: int, progress: Progress
) -> None:
    """Train the warm starts first, so that no two cells train the same one."""
    configs = list(dict.fromkeys(cell.policy for cell in cells))
    bar = progress.add_task("Warm starts", total=len(configs), news="some minutes each")
    with ProcessPoolExecutor(jobs, mp_context=processes, initializer=be_quiet_and_small) as pool:
        for finished in as_completed([pool.submit(warm_start, cache_dir, config) for config in configs]):
            finished.result()
            progress.advance(bar)
    progress.update(bar, news="")


class _Progress:
    """A progress bar over all cells, with the estimated time left. Without a terminal, lines are printed instead."""

    def __init__(self, progress: Progress, total: int, jobs: int, cells_dir: Path):
        self.progress = progress
        self.total = total
        self.done = 0
        self.jobs = jobs
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.cells_dir = cells_dir
        self.left = ""
        self.bar: TaskID = progress.add_task("Runs", total=total, news="")

    def finished(self, cell: Cell, now: bool = True) -> None:
        """Count a cell that has a result, made now or in an earlier call."""
        result = result_of(self.cells_dir / cell.name)
        self.seconds[cell.arm_name].append(result["seconds"])
        self.done += 1
        self.progress.advance(self.bar)
        if now and not self.progress.console.is_terminal:
            found = f"accuracy {result['accuracy']:.3f}, " if "accuracy" in result else ""
            self.progress.console.print(
                f"{self.done}/{self.total} {cell.name}: {found}{result['seconds']:.0f} s{self.left}",
                soft_wrap=True,
                markup=False,
                highlight=False,
            )

    def show(self, running: list[_Running], waiting: list[Cell]) -> None:
        known = [seconds for of_arm in self.seconds.values() for seconds in of_arm]
        if known:
            # Arms differ tenfold in cost: each is estimated by its own runs, an arm without runs by the mean of all.
            mean = statistics.mean(known)
            costs = {arm: statistics.mean(of_arm) for arm, of_arm in self.seconds.items()}
            left = sum(costs.get(cell.arm_name, mean) for cell in waiting)
            left += sum(max(costs.get(r.cell.arm_name, mean) - (time.monotonic() - r.started), 0) for r in running)
            self.left = f" (about {left / self.jobs / 60:.0f} min left)"
        self.progress.update(self.bar, news=", ".join(run.cell.arm_name for run in running) + self.left)


def _run_cells(
    processes: ForkServerContext,
    cells: list[Cell],
    cells_dir: Path,
    cache_dir: str | Path,
    jobs: int,
    show: _Progress,
    later: list[Cell],
) -> None:
    waiting = []
    for cell in cells:
        if result_of(cells_dir / cell.name) is None:
            waiting.append(cell)
        else:
            show.finished(cell, now=False)
    running: list[_Running] = []
    failed: list[Cell] = []
    try:
        while running or (waiting and not failed):
            while waiting and not failed and len(running) < jobs:
                running.append(_start(processes, waiting.pop(0), cells_dir, cache_dir))
            show.show(running, [*waiting, *later])
            time.sleep(_POLL_SECONDS)
            for run in [run for run in running if not run.process.is_alive()]:
                running.remove(run)
                run.alive.close()
                if run.process.exitcode == 0:
                    show.finished(run.cell)
                else:
                    failed.append(run.cell)
    finally:
        # Interrupted: the running cells are useless.
        for run in running:
            run.process.terminate()
        for run in running:
            run.process.join()
    if failed:
        log = cells_dir / failed[0].name / LOG_NAME
        last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise CellFailed(f"The run {failed[0].name} failed; its log is {log}:\n{last_lines}")


def _start(processes: ForkServerContext, cell: Cell, cells_dir: Path, cache_dir: str | Path) -> _Running:
    folder = cells_dir / cell.name
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
    folder.mkdir()
    write_text(folder / CELL_NAME, cell.to_json())
    parents_end, alive = processes.Pipe()
    process = processes.Process(target=run_cell_process, args=(folder, cache_dir, folder / LOG_NAME, alive))
    process.start()
    alive.close()
    return _Running(cell, process, time.monotonic(), parents_end)
