"""
The demo: a warm start, training with SAPO, and the accuracy before and after it.

The results are a table, two pictures and a recording for `sapo-trl view`.
"""

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForImageTextToText, PreTrainedModel, PrinterCallback, ProcessorMixin, TrainerCallback

from ..callbacks import RolloutCallback, SegmentationCallback, ValueDiagnostics
from ..config import SAPOConfig
from ..data import to_prompts
from ..embedded import Evaluation, default_cache_dir, evaluate, load_processor
from ..files import write_text
from ..plots import SEGMENT_COLOURS, plot_learning_curve, plot_response
from ..recordings import segmented_responses
from ..rewards import accuracy_reward
from ..rollouts.types import SegmentedRollout
from ..study.boxed import longest_response, warm_start, warm_start_config
from ..study.task import WarmStartConfig, WarmStartProgress, make_problems
from ..trainer import SAPOTrainer


RESPONSES_PER_ROLLOUT = 128
MINI_BATCHES = 8
WARM_START_STEPS = 360
"""Approximate number of warm-start steps, for the progress bar."""
RECORDED_RESPONSES = 8
VALUED_RESPONSES, CONTINUATIONS = 5, 12
"""Responses of a rollout with Monte-Carlo values, and the continuations of each of their states."""


def demo_config(output_dir: str | Path, rollouts: int = 12, seed: int = 0) -> SAPOConfig:
    """
    Settings of the demo. The other settings have their defaults, which are SAPO's.

    The model is tiny and its task easy. So learning rates are about a hundred times a real model's, and no KL penalty
    holds the policy near its start.
    """
    return SAPOConfig(
        output_dir=str(output_dir),
        max_steps=rollouts * MINI_BATCHES,
        num_mini_batches=MINI_BATCHES,
        per_device_train_batch_size=RESPONSES_PER_ROLLOUT // MINI_BATCHES,
        per_device_eval_batch_size=RESPONSES_PER_ROLLOUT,
        max_completion_length=longest_response(warm_start_config().task),
        learning_rate=5e-4,
        critic="ladder",
        critic_learning_rate=1e-3,
        critic_updates_per_step=2,
        beta=0.0,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=MINI_BATCHES,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )


def run_demo(
    output_dir: str | Path = "outputs/demo",
    rollouts: int = 12,
    problems: int = 512,
    seed: int = 0,
    *,
    cache_dir: str | Path | None = None,
    warm_start_settings: WarmStartConfig | None = None,
    console: Console | None = None,
) -> int:
    """
    Run the demo.

    Args:
        output_dir (`str` or `Path`, *optional*, defaults to `"outputs/demo"`):
            Folder for `results.json`, `learning_curve.png`, `response.png`, and `model` with the trained model and
            the recorded run.
        rollouts (`int`, *optional*, defaults to `12`):
            Number of training rollouts, each of 128 responses.
        problems (`int`, *optional*, defaults to `512`):
            Test problems for each measured accuracy. Other problems are used after training than before it.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all random numbers, and of the signs' meanings.
        cache_dir (`str` or `Path`, *optional*):
            Folder of finished warm starts. Defaults to [`~sapo_trl.embedded.default_cache_dir`].
        warm_start_settings ([`~sapo_trl.study.task.WarmStartConfig`], *optional*):
            Settings of the warm start. By default [`~sapo_trl.study.boxed.warm_start_config`]'s, with `seed`.
        console ([`~rich.console.Console`], *optional*):
            Console to print to.

    Returns:
        `int`: 0 if training raised the accuracy significantly (the 95 % intervals before and after do not overlap),
        otherwise 1.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    if "OMP_NUM_THREADS" not in os.environ:
        # A second thread makes so small a model a quarter faster. But if another process uses the second core, the
        # threads wait for each other in busy loops. This was measured to be seventeen times slower.
        torch.set_num_threads(1)
    console = console or Console()
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (
        _quiet_libraries(),
        Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TextColumn("{task.fields[news]}"),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
    ):
        stages = Stages(progress)
        settings = warm_start_settings or warm_start_config(seed)
        with stages.stage("Supervised warm start", WARM_START_STEPS) as report:
            folder = warm_start(
                cache_dir or default_cache_dir(),
                settings,
                on_progress=lambda news: report(news.step, _describe(news)),
            )
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), load_processor(folder)
        # These are two disjoint sets of test problems. Training draws from the other split.
        test = make_problems(settings.task, 2 * problems, split="test", seed=seed)
        with stages.stage("Accuracy before", 2 * problems) as report:
            before, greedy_before = _measure(model, processor, test.select(range(problems)), seed, report)
        with stages.stage("Training with SAPO", rollouts) as report:
            example = LastRollout()
            config = demo_config(output_dir / "model", rollouts, seed)
            trainer = SAPOTrainer(
                model,
                accuracy_reward,
                config,
                to_prompts(make_problems(settings.task, rollouts * RESPONSES_PER_ROLLOUT, seed=seed)),
                processing_class=processor,
                peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
                callbacks=[ReportReward(report), example, *recorders(config.output_dir, rollouts)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            trainer.save_model()
            trainer.save_state()
            learning_curve = training_accuracy(trainer.state.log_history)
        after_problems = test.select(range(problems, 2 * problems))
        with stages.stage("Accuracy after", 2 * problems) as report:
            after, greedy_after = _measure(trainer.model, processor, after_problems, seed, report)
        with stages.stage("Values of the critic", 1):
            shown_problems = after_problems.select(range(min(problems, RESPONSES_PER_ROLLOUT)))
            trainer.evaluate(to_prompts(shown_problems))
            response = response_to_draw(example.rollout, trainer.state.global_step)
            problem = next(p for p in shown_problems if p["problem"].removeprefix("<image>") in response["prompt"])

    plot_learning_curve(output_dir / "learning_curve.png", learning_curve, RESPONSES_PER_ROLLOUT, before, after)
    plot_response(output_dir / "response.png", response, problem)
    results = {
        "accuracy_before": before.accuracy,
        "interval_before": before.interval,
        "accuracy_after": after.accuracy,
        "interval_after": after.interval,
        "greedy_accuracy_before": greedy_before.accuracy,
        "greedy_accuracy_after": greedy_after.accuracy,
        "test_problems": problems,
        "training_accuracy": learning_curve,
        "responses_per_rollout": RESPONSES_PER_ROLLOUT,
        "explained_variance": explained_variances(trainer.state.log_history),
        "response": response,
        "warm_start": str(folder),
        "seed": seed,
        "seconds": {**stages.seconds, "total": time.perf_counter() - started},
        "cpu_seconds": time.process_time() - cpu_started,
    }
    write_text(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    _print_results(console, output_dir, results, before, after)
    if after.interval[0] > before.interval[1]:
        return 0
    console.print(
        f"[bold red]No improvement shown:[/] the 95 % intervals {_percent(before)} and {_percent(after)} overlap "
        "or accuracy fell. Train on more `--rollouts` or measure on more `--problems`."
    )
    return 1


class ReportReward(TrainerCallback):
    """Reports each rollout's accuracy to the progress bar."""

    def __init__(self, report: Callable[[int, str], None]):
        self.report = report

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            self.report(state.global_step // args.num_mini_batches, f"accuracy {logs['reward']:.0%}")


def recorders(folder: str, rollouts: int) -> list[RolloutCallback]:
    """Callbacks that record responses of four rollouts, and Monte-Carlo values of the first and the last one."""
    return [
        SegmentationCallback(
            f"{folder}/segments", every=max((rollouts - 1) // 3, 1), max_responses=RECORDED_RESPONSES
        ),
        ValueDiagnostics(max(rollouts - 1, 1), CONTINUATIONS, VALUED_RESPONSES, f"{folder}/values"),
    ]


class LastRollout(RolloutCallback):
    """Keeps the latest rollout."""

    rollout = None

    def on_rollout(self, args, state, control, rollout, metrics):
        self.rollout = rollout


def response_to_draw(rollout: SegmentedRollout, step: int) -> dict[str, Any]:
    """
    The record of a wrong response, with `monte_carlo_values` and their `standard_errors` (`None` where no segment
    starts).

    It is the response with the largest fall of Monte-Carlo values from one segment to the next, among the first wrong
    ones. So the critic has no say in it. Without a wrong response it is among the right ones.
    """
    wrong = rollout.rewards != 1
    chosen = (wrong if wrong.any() else ~wrong).nonzero()[:VALUED_RESPONSES, 0]
    states = torch.zeros_like(rollout.segments.mask)
    states[chosen] = rollout.segments.state_mask("start")[chosen]
    found = rollout.continuations.values_at(states, rollout.completion_ids, CONTINUATIONS)
    values = torch.full(states.shape, torch.nan)
    errors = values.clone()
    values[states], errors[states] = found.values, found.rewards.std(dim=1) / CONTINUATIONS**0.5
    falls = {
        row: -values[row, states[row]].diff(append=rollout.rewards[row : row + 1]).min() for row in chosen.tolist()
    }
    row = max(falls, key=falls.__getitem__)
    response = segmented_responses(rollout, step)[row]
    kept = rollout.segments.mask[row]
    for name, numbers in (("monte_carlo_values", values), ("standard_errors", errors)):
        response[name] = [None if number != number else number for number in numbers[row, kept].tolist()]
    return response


class Stages:
    """A progress bar and the elapsed seconds of each stage. Without a terminal, a line is printed now and then."""

    SECONDS_PER_LINE = 10.0

    def __init__(self, progress: Progress):
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        task = self.progress.add_task(name, total=total, news="")
        console = self.progress.console
        started = last_line = time.perf_counter()

        def report(completed: int, news: str = "") -> None:
            nonlocal last_line
            # The warm start's length is known only afterwards. Its bar may have to wait at the end.
            self.progress.update(task, completed=min(completed, total), news=news)
            now = time.perf_counter()
            if not console.is_terminal and now - last_line > self.SECONDS_PER_LINE:
                last_line = now
                console.print(f"{name}: {completed}/{total} {news} ({now - started:.0f} s)", highlight=False)

        yield report
        self.progress.update(task, completed=total)
        self.seconds[name] = time.perf_counter() - started


def training_accuracy(log_history: list[dict[str, float]]) -> list[float]:
    """Accuracy of each training rollout, from the trainer's log."""
    return [entry["rewards/accuracy_reward/mean"] for entry in log_history if "rewards/accuracy_reward/mean" in entry]


def explained_variances(log_history: list[dict[str, float]]) -> list[float]:
    """Explained variance of the critic's values in each training rollout, before it learns from that rollout."""
    return [entry["critic/explained_variance"] for entry in log_history if "critic/explained_variance" in entry]


def colour_segments(response: dict) -> Text:
    """A response for the terminal, with a background colour for each segment and a line between two segments."""
    text = Text()
    previous = 0
    for token, segment in zip(response["tokens"], response["segment_ids"], strict=True):
        if segment != previous:
            text.append("│", style="dim")
        previous = segment
        text.append(token, style=f"black on {SEGMENT_COLOURS[segment % len(SEGMENT_COLOURS)]}")
    return text


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Leave the terminal to the demo's progress bars."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        datasets.enable_progress_bars()


def _describe(news: WarmStartProgress) -> str:
    return f"{news.accuracy:.0%} of the lines well written"


def _percent(evaluation: Evaluation) -> str:
    low, high = evaluation.interval
    return f"{low:.1%} – {high:.1%}"


def _measure(
    model: PreTrainedModel, processor: ProcessorMixin, problems: Dataset, seed: int, report: Callable[..., None]
) -> tuple[Evaluation, Evaluation]:
    """Accuracy with sampling, which training raises, and with greedy decoding."""
    sampled = evaluate(model, processor, problems, seed=seed, on_progress=report)
    greedy = evaluate(
        model, processor, problems, temperature=0.0, on_progress=lambda done: report(len(problems) + done)
    )
    return sampled, greedy


def _print_results(console: Console, output_dir: Path, results: dict, before: Evaluation, after: Evaluation) -> None:
    table = Table(title=f"Accuracy on {results['test_problems']} unseen problems")
    for column in ("", "sampled", "95 % interval", "greedy"):
        table.add_column(column)
    table.add_row("before", f"{before.accuracy:.1%}", _percent(before), f"{results['greedy_accuracy_before']:.1%}")
    table.add_row("after SAPO", f"{after.accuracy:.1%}", _percent(after), f"{results['greedy_accuracy_after']:.1%}")
    console.print(table)
    explained = statistics.mean(results["explained_variance"] or [0.0])  # none if all rewards are equal
    console.print(f"The critic explains {explained:.0%} of the variance of rewards, in the mean of the rollouts.")
    console.print("A wrong response and its segments:", colour_segments(results["response"]), sep="\n")
    console.print(f"\nLearning curve, picture of the response and results: {output_dir}/")
    console.print(f"Look at the recorded responses: sapo-trl view {output_dir}/model", soft_wrap=True)
    seconds = {**results["seconds"], "CPU": results["cpu_seconds"]}
    console.print("Seconds: " + ", ".join(f"{name} {number:.0f}" for name, number in seconds.items()))
