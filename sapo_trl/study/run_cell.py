"""Runs one cell of a study in a separate process."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, TrainerCallback

from ..analysis import GradientVariance
from ..callbacks import SegmentationCallback, ValueDiagnostics
from ..config import LEARNED_CRITICS, SAPOConfig
from ..embedded import load_processor
from ..files import write_text
from ..presets import preset_settings
from ..segmentation import NoisyBoundaries, RandomCuts, Segmenter
from ..trainer import SAPOTrainer
from ..trainer.setup import make_segmenter
from .cells import CELL_NAME, RESULT_NAME, Cell
from .code import PACKAGES, code_fingerprint
from .credit import GROUP, SHOWN_PROBLEMS, SHOWN_SEED, CreditRecorder
from .task import (
    OracleSegmenter,
    code_reward,
    evaluate_task,
    log_odds,
    longest_response,
    make_problems,
    sample_problems,
    to_task_prompts,
    warm_start,
)


METRICS_NAME = "metrics.jsonl"
RESPONSES_FOLDER = "responses"
VALUES_FOLDER = "values"
# Problems of different seeds overlap only by chance. The evaluation has the same problems for all runs of a world.
_EVALUATION_SEED = 7
# Torch's message about probabilities that are not numbers.
_SAMPLING_FAILED = "probability tensor contains"


def run_cell(folder: str | Path, cache_dir: str | Path) -> dict[str, Any]:
    """
    Train one cell and measure it. An interrupted cell is run again from its beginning.

    Args:
        folder (`str` or `Path`):
            Its folder, with `cell.json`. Gets `metrics.jsonl`, the study's recordings and, at the end, `result.json`.
        cache_dir (`str` or `Path`):
            Folder of finished warm starts.

    Returns:
        `dict`: the content of `result.json`.
    """
    started = time.perf_counter()
    folder = Path(folder)
    cell = Cell.from_json((folder / CELL_NAME).read_text())
    for name in (RESPONSES_FOLDER, VALUES_FOLDER, "trainer"):
        shutil.rmtree(folder / name, ignore_errors=True)
    checkpoint = warm_start(cache_dir, cell.policy)
    auto_class = AutoModelForImageTextToText if cell.task.pictures else AutoModelForCausalLM
    model, processor = auto_class.from_pretrained(checkpoint), load_processor(checkpoint)

    args = cell_config(cell, folder / "trainer")
    gradients = GradientVariance() if cell.measure == "gradient_variance" else None
    metrics = _MetricsFile(folder / METRICS_NAME)
    callbacks = [metrics, *_recorders(cell, args, folder), *([gradients] if gradients else [])]
    if cell.measure == "credit":
        last = args.max_steps - args.num_mini_batches
        callbacks.append(CreditRecorder(folder, cell.task, model, processor, last))
    trainer = (CentredTrainer if cell.arm.centred else SAPOTrainer)(
        model,
        code_reward,
        args,
        _prompts(cell, args),
        processing_class=processor,
        segmenter=cell_segmenter(cell, args),
        peft_config=_adapters(cell),
        callbacks=callbacks,
    )
    clock, failed = _TrainingClock(), None
    try:
        trainer.train()
        cpu_seconds = clock.read(metrics.rows)
        measured = {}
        if gradients:
            measured = asdict(gradients.result())
        elif cell.measure == "accuracy":
            measured = _evaluation(trainer.model, processor, cell)
    except (FloatingPointError, RuntimeError) as error:
        if not isinstance(error, FloatingPointError) and _SAMPLING_FAILED not in str(error):
            raise
        # A diverged policy is a result of the study, not an error. Its accuracy is 0.
        cpu_seconds = clock.read(metrics.rows)
        failed, measured = str(error), {"accuracy": 0.0, "complete": 0.0, "correct": 0}
        measured |= _log_odds(trainer.model, processor, cell)
    result = {
        "arm": cell.arm_name,
        "preset": cell.arm.preset,
        "task": cell.task_name,
        "world": cell.task.world,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "split": cell.split,
        "measure": cell.measure,
        "failed": failed,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": cpu_seconds,
        "optimizer_steps": trainer.state.global_step,
        **_costs(trainer.state.log_history, args),
        "reward_curve": [row["reward"] for row in metrics.rows],
        **measured,
        "environment": environment(),
    }
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    # Last, and at once: with this file the cell is finished.
    write_text(folder / RESULT_NAME, json.dumps(result, indent=2) + "\n")
    return result


def cell_config(cell: Cell, output_dir: Path) -> SAPOConfig:
    """The trainer's settings: the study's, then the arm's, then the comparison's, which are equal for all arms."""
    budget = cell.budget
    responses = budget.responses * cell.arm.samples
    settings = {**cell.settings, **cell.arm.settings}
    rollouts, mini_batches = budget.rollouts, budget.mini_batches
    critic = {"critic": "separate", **preset_settings(cell.arm.preset), **settings}["critic"]
    if cell.measure == "gradient_variance":
        settings["max_grad_norm"] = 0.0
        if critic in LEARNED_CRITICS:
            # At first only the critic learns, without gradients of the policy. The measurement has a trained critic.
            settings["critic_warmup_steps"] = budget.rollouts * budget.mini_batches // 2
    elif cell.measure == "credit":
        responses = SHOWN_PROBLEMS * GROUP
        # A critic has learned from as many responses as in a run, in steps of nearly the same size.
        mini_batches = max(
            n
            for n in range(1, responses + 1)
            if responses % n == 0 and n * budget.responses <= responses * mini_batches
        )
        rollouts = 1 + (round(budget.rollouts * budget.responses / responses) if critic in LEARNED_CRITICS else 0)
        settings |= {"num_generations": GROUP, "shuffle_dataset": False}
    return SAPOConfig.from_preset(
        cell.arm.preset,
        **settings,
        output_dir=str(output_dir),
        learning_rate=cell.learning_rate,
        seed=cell.seed,
        max_steps=rollouts * mini_batches,
        num_mini_batches=mini_batches,
        per_device_train_batch_size=responses // mini_batches,
        max_completion_length=longest_response(cell.task),
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=mini_batches,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def cell_segmenter(cell: Cell, args: SAPOConfig) -> Segmenter | None:
    """The arm's own segmenter, if it has one."""
    if cell.arm.segmenter == "random_cuts":
        return RandomCuts(make_segmenter(args), seed=cell.seed)
    if cell.arm.segmenter == "noisy":
        return NoisyBoundaries(make_segmenter(args), cell.arm.boundary_noise, seed=cell.seed)
    if cell.arm.segmenter in ("oracle_decisions", "line_pairs"):
        return OracleSegmenter(cell.arm.segmenter.removeprefix("oracle_"))
    return None


class CentredTrainer(SAPOTrainer):
    """A trainer whose advantages have mean 0 at each position, so that none pushes tokens that all responses share."""

    def estimate_advantages(self, token_rewards, values, segments, batch):
        advantages, returns = super().estimate_advantages(token_rewards, values, segments, batch)
        mean = torch.where(segments.mask, advantages, 0).sum(0) / segments.mask.sum(0).clamp(min=1)
        return torch.where(segments.mask, advantages - mean, 0), returns


def _prompts(cell: Cell, args: SAPOConfig) -> datasets.Dataset:
    """The problems to train on. Of a measurement of credit the last ones are shown, in order."""
    count = args.max_steps // args.num_mini_batches * args.generation_batch_size // args.num_generations
    if cell.measure == "credit":
        shown = make_problems(cell.task, SHOWN_PROBLEMS, seed=SHOWN_SEED)
        if count > SHOWN_PROBLEMS:
            others = make_problems(cell.task, count - SHOWN_PROBLEMS, seed=1000 + cell.seed)
            shown = datasets.concatenate_datasets([others, shown])
        return to_task_prompts(shown)
    return to_task_prompts(make_problems(cell.task, count, seed=1000 + cell.seed))


def _adapters(cell: Cell) -> LoraConfig | None:
    rank = cell.lora_rank
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear") if rank else None


def environment() -> dict[str, Any]:
    """Commit, fingerprint of the code, and versions of the run."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "commit": commit or None,
        "code": code_fingerprint(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("sapo_trl", *PACKAGES)},
    }


class _MetricsFile(TrainerCallback):
    """Writes the trainer's log to a file as it happens, one JSON object per line."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, float]] = []
        path.write_text("")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs:  # the summary at the end
            return
        row = {"step": state.global_step, **logs}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _recorders(cell: Cell, args: SAPOConfig, folder: Path) -> list[TrainerCallback]:
    records = cell.records
    if records is None:
        return []
    recorders: list[TrainerCallback] = [
        SegmentationCallback(folder / RESPONSES_FOLDER, every=records.every, max_responses=records.responses)
    ]
    if records.continuations and args.learns_critic:
        recorders.append(
            ValueDiagnostics(
                every=records.every,
                num_continuations=records.continuations,
                max_responses=records.valued_responses,
                output_dir=folder / VALUES_FOLDER,
            )
        )
    return recorders


class _TrainingClock:
    """CPU seconds of training. If the machine has other work, they are more reliable than wall time."""

    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def read(self, rows: list[dict[str, float]]) -> float:
        """CPU seconds without the time of recordings. Only the wall time of recordings is known."""
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        return cpu * (1 - sum(row.get("time/value_diagnostics", 0.0) for row in rows) / wall)


def _costs(log_history: list[dict[str, float]], args: SAPOConfig) -> dict[str, float]:
    """Costs of the run: responses and tokens of rollouts, and sampled tokens, continuations included."""
    rows = [row for row in log_history if "reward" in row]
    rollouts = sum(row["completions/mean_length"] * args.generation_batch_size for row in rows)
    tree = sum(row.get("tree/tokens", 0.0) for row in rows)
    continued = sum(row.get("monte_carlo/tokens", 0.0) for row in rows)
    return {
        "completions": len(rows) * args.generation_batch_size,
        "rollout_tokens": rollouts,
        "sampled_tokens": tree or rollouts + continued,
    }


def _evaluation(model: PreTrainedModel, processor: Any, cell: Cell) -> dict[str, Any]:
    problems, seed = cell.budget.test_problems, _EVALUATION_SEED + cell.task.world
    found = evaluate_task(model, processor, cell.task, problems, split=cell.split, seed=seed)
    return {
        "accuracy": found.accuracy,
        "correct": sum(found.correct),
        "right_decisions": found.right_decisions,
        "right_decisions_at_gate": found.at_gate,
        "well_read": found.well_read,
        "complete": found.complete,
        **_log_odds(model, processor, cell),
    }


def _log_odds(model: PreTrainedModel, processor: Any, cell: Cell) -> dict[str, float]:
    seed = _EVALUATION_SEED + cell.task.world
    problems = sample_problems(cell.task, cell.budget.test_problems, split=cell.split, seed=seed)
    found = log_odds(model, processor, cell.task, problems, seed=seed)
    # A policy whose probabilities are no numbers knows nothing: it is counted as one that guesses.
    guesses = {"log_odds": (found.decisions, 1 / 3), "reading_log_odds": (found.readings, 1 / 8)}
    return {name: x.mean().nan_to_num(math.log(odds)).item() for name, (x, odds) in guesses.items()}


def _end_with_parent(alive: Connection) -> None:
    """End the cell if its study is killed: no cell may go on writing into its folder."""
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    os._exit(1)


def run_cell_process(folder: Path, cache_dir: str | Path, log: Path, alive: Connection) -> None:
    """
    The main function of a cell's process: see [`run_cell`].

    Args:
        folder (`Path`): folder of the cell.
        cache_dir (`str` or `Path`): folder of finished warm starts.
        log (`Path`): file for the process's output.
        alive (`Connection`): the process ends when the other end is closed.
    """
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    be_quiet_and_small()
    run_cell(folder, cache_dir)


def be_quiet_and_small() -> None:
    """Turn off the libraries' progress bars and warnings, and use one thread."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # A second thread gains little on models this small, and the study runs two cells at a time.
    torch.set_num_threads(1)
