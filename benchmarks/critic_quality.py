"""
The quality of each critic after it has learned from the same responses of a frozen policy.

On each task a warm-started policy stays frozen. For each seed it samples responses once, and all critics learn from
these responses, with the package's value loss and optimizer. Nothing is downloaded.

    python benchmarks/critic_quality.py tune --task picture_6 --out results      # learning rates, on tuning seeds
    python benchmarks/critic_quality.py compare --task picture_6 --out results   # the comparison, on other seeds
    python benchmarks/critic_quality.py report --out results                     # the table and the picture

Each run adds a line to `critic_quality.jsonl`. A run with a line is not repeated, so an interrupted command can be
started again.

Registered before the first run on a reported seed:

- Tasks: `picture_6` of the study and the embedded geometry task, with one policy each. A seed decides the problems,
  the responses, their order and the critic's initial weights. The same rules hold for the demo's task, added later.
- Budget: the study's, for all tasks. 768 responses, eight in each optimizer step, in one pass and in two; a constant
  rate. Targets are the rewards, as with `critic_lam=1`, so all critics have the same. The values are not clipped.
- Tuning: all critics are given the same learning rates on the tuning seeds. A critic's rate is the rate with the
  highest mean explained variance, for one pass and for two passes separately.
- First measure: explained variance of the rewards of 400 other responses, at the states that critics learn.
- Second measure: mean squared error against Monte-Carlo values of 192 of these states, less the mean sampling variance
  of the Monte-Carlo values.
- Comparison: each critic minus `separate`, paired by seed, with Student's 95 % interval.
- Limit: the share of the rewards' variance that lies between states, from the same continuations. No critic can
  explain more on average. The variance between states is also the error of the best constant.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from critic_lessons import LEARNED, STUDY, TASKS, lesson, returns_of, settings
from critic_quality_report import CRITICS, LEARNING_RATES, PASSES, SEEDS, TUNING_SEEDS, Results, as_markdown, draw
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, set_seed

from sapo_trl import Segments, SegmentValueHead, embedded
from sapo_trl.critic.training import Critic
from sapo_trl.losses import segment_value_loss
from sapo_trl.study.run_cell import be_quiet_and_small
from sapo_trl.trainer.padding import take_rows


ROWS_PER_STEP = STUDY.budget.responses // STUDY.budget.mini_batches


def make_critic(name: str, policy: PreTrainedModel, seed: int, learning_rate: float) -> Critic:
    """A critic of this kind, with its optimizer."""
    mode, _, sizes = name.partition(":")
    set_seed(seed)
    if mode == "adapter":
        rank = STUDY.lora_rank
        policy = get_peft_model(policy, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    sizes = {key: int(number) for key, number in (size.split("=") for size in filter(None, sizes.split(",")))}
    head = SegmentValueHead.from_policy(policy, mode, **sizes)
    args = settings(seed=seed, critic=mode, critic_learning_rate=learning_rate, cliprange_value=None)
    return Critic(head, args, Accelerator(cpu=True), decay_parameter_names=[])


def run(
    task: str,
    responses: int,
    seed: int,
    critic: str,
    learning_rate: float,
    *,
    passes: int = PASSES,
    cache_dir: Path,
) -> dict[str, Any]:
    """Train one critic, and test it after each pass."""
    taught = lesson(task, seed, cache_dir, responses)
    learner, started, measured = make_critic(critic, taught.policy(), seed, learning_rate), time.process_time(), []
    learner.create_scheduler(passes * responses // ROWS_PER_STEP)
    order = np.random.default_rng(seed)
    for _ in range(passes):
        for rows in order.permutation(responses).reshape(-1, ROWS_PER_STEP).tolist():
            batch = take_rows(taught.recorded["learned"], rows)
            with learner.accumulate():
                values = taught.values(learner.value_head, "learned", rows)
                segments, returns = Segments(batch["segment_ids"]), returns_of(batch)
                learner.backward(segment_value_loss(values, values, returns, segments, cliprange_value=None).loss)
            learner.clip_gradient()
            learner.step()
        measured.append(taught.test(learner.value_head))
    parameters = sum(parameter.numel() for _, parameter in learner.value_head.learned_parameters())
    return {"measured": measured, "parameters": parameters, "cpu_seconds": time.process_time() - started}


def tune(options: argparse.Namespace, results: Results) -> None:
    """Run every learning rate on the tuning seeds."""
    common = {"task": options.task, "responses": options.responses}
    for seed in options.seeds or TUNING_SEEDS:
        for critic in options.critics:
            for rate in options.rates:
                what = {**common, "critic": critic, "seed": seed, "learning_rate": rate}
                results.add(lambda what=what: run(**what, cache_dir=options.cache), **what)


def compare(options: argparse.Namespace, results: Results) -> None:
    """Run the chosen learning rates on the reported seeds."""
    common = {"task": options.task, "responses": options.responses}
    for seed in options.seeds or SEEDS:
        taught = partial(lesson, options.task, seed, options.cache, options.responses)
        results.add(lambda taught=taught: taught().limit(), **common, limit=True, seed=seed)
        for critic in options.critics:
            one_pass, two_passes = results.tuned(options.task, critic)
            for rate, passes in {one_pass: 1, two_passes: PASSES}.items():
                what = {**common, "critic": critic, "seed": seed, "learning_rate": rate}
                results.add(lambda what=what, n=passes: run(**what, passes=n, cache_dir=options.cache), **what)


def report(options: argparse.Namespace, results: Results) -> None:
    """Write the table and the picture of the tasks that have been compared."""
    table = as_markdown(results)
    (options.out / "critic_quality.md").write_text(table)
    draw(options.out / "critic_quality.png", results)
    print(table)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "compare", "report"))
    parser.add_argument("--task", choices=tuple(TASKS), default="picture_6")
    parser.add_argument("--critics", nargs="+", default=list(CRITICS), help="such as ladder:layers=3,width=64")
    parser.add_argument("--rates", nargs="+", type=float, default=LEARNING_RATES, help="learning rates to tune over")
    parser.add_argument("--seeds", nargs="+", type=int, help="other seeds than the command's own")
    parser.add_argument("--responses", type=int, default=LEARNED, help="to learn from; the table has the default")
    parser.add_argument("--cache", type=Path, default=embedded.default_cache_dir(), help="folder of policies")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the results")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print."""
    options = parser().parse_args(argv)
    be_quiet_and_small()
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "critic_quality.jsonl")
    {"tune": tune, "compare": compare, "report": report}[options.command](options, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
