"""
Time of a rollout with and without `rollouts_ahead`, for five ratios of generation to update.

The server is `stand_in.py`: over real HTTP it answers after a set time, without work. The update has a set time too: a
tiny model is trained, and a callback sleeps for the rest. So both sides leave the processor free, like two machines
with GPUs, and the times show the overlap alone. "Update" is the trainer's own time for a rollout, without its calls of
the sampler: scoring, rewards and optimizer steps.

    python benchmarks/ahead.py --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import stand_in
import torch
from datasets import Dataset
from rows import machine
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.embedded import build_tokenizer
from sapo_trl.generation import VLLMServerRollout


RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
GOAL = 1.1
"""Largest time of a rollout, relative to the longer of generation and update."""


class Clock(TrainerCallback):
    """Makes each optimizer step last for a set time at least, and notes when rollouts end."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.ends: list[float] = []
        self._began = 0.0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(max(0.0, self.seconds - (time.monotonic() - self._began)))
        if state.global_step % args.num_mini_batches == 0:
            self.ends.append(time.monotonic())


class Timed(VLLMServerRollout):
    """Notes the time of each call that waits for responses."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seconds: list[float] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list]:
        began = time.monotonic()
        output = super().__call__(prompts, trainer)
        self.seconds.append(time.monotonic() - began)
        return output


def seconds_per_rollout(generate: float, ahead: int, options: argparse.Namespace) -> tuple[float, float]:
    """Median time of a rollout, from the end of one update to the end of the next; and without waiting calls."""
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    questions = [[{"role": "user", "content": f"Find {'A' * (1 + i % 7)}B."}] for i in range(32)]
    clock = Clock(options.update / options.mini_batches)
    with tempfile.TemporaryDirectory() as folder, stand_in.running("--seconds", str(generate)) as url:
        args = SAPOConfig(
            output_dir=folder,
            rollouts_ahead=ahead,
            max_steps=options.mini_batches * (options.rollouts + 2),
            num_mini_batches=options.mini_batches,
            per_device_train_batch_size=4,
            max_completion_length=8,
            critic="none",
            advantage_estimator="batch",
            max_sampler_logp_difference=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        SAPOTrainer(
            model=Qwen2ForCausalLM(config),
            reward_funcs=lambda completion_ids, **kwargs: [float(len(ids) % 3) for ids in completion_ids],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": questions}),
            processing_class=tokenizer,
            rollout_func=(sampler := Timed(url, Path(folder) / "weights", start_timeout=60)),
            callbacks=[clock],
        ).train()
    # The first rollout is always waited for, and the second one may have been requested early.
    times = [end - begin for begin, end in zip(clock.ends[1:], clock.ends[2:], strict=False)]
    own = [total - waited for total, waited in zip(times, sampler.seconds[2:], strict=False)]
    return statistics.median(times), statistics.median(own or times)


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "| generate / update | generate | update | one after the other | one rollout ahead | relative to the longer |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        numbers = (row["generate"], row["update"], row["waiting"], row["ahead"])
        seconds = " | ".join(f"{number:.2f} s" for number in numbers)
        lines.append(f"| {row['ratio']:g} | {seconds} | {row['relative']:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS), help="of generation to update")
    parser.add_argument("--update", type=float, default=3.0, help="seconds of a rollout's optimizer steps, at least")
    parser.add_argument("--mini_batches", type=int, default=2, help="optimizer steps of a rollout")
    parser.add_argument("--rollouts", type=int, default=4, help="rollouts to time")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    report: dict[str, Any] = {"machine": machine(), "rows": []}
    for ratio in options.ratios:
        _, update = seconds_per_rollout(0.0, 0, options)  # each time, because the load of a machine changes
        generate = ratio * update
        waiting, ahead = (seconds_per_rollout(generate, n, options)[0] for n in (0, 1))
        row = {"ratio": ratio, "generate": generate, "update": update, "waiting": waiting, "ahead": ahead}
        row["relative"] = ahead / max(generate, update)
        report["rows"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "ahead.json").write_text(json.dumps(report, indent=2) + "\n")
        (options.out / "ahead.md").write_text(as_markdown(report))
    print(as_markdown(report), end="")
    return int(any(row["relative"] > GOAL for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
