"""
Cost of scoring and updating with each of SAPO's critics, compared with TRL's GRPO on the same responses.

Both trainers get the same prompts with a picture each, and the same responses with log-normal lengths. Nothing is
generated and rewards take no time, so a step consists of scoring and updating. The model has random weights and
Qwen2.5-VL's shape. Nothing is downloaded.

    python benchmarks/update_cost.py --out results                   # Qwen2.5-VL-3B's shape, on a GPU
    python benchmarks/update_cost.py --size tiny --out results       # a tiny model, on a CPU too

First it counts: the floating-point operations of a rollout (`operations.py`) and the peak of the tensors' memory. The
operations are the same on each run, also where other programs use the machine. Then it takes times, with each row in a
process of its own. Rows take turns, and a ratio compares two rows of the same turn. `--turns 0` only counts. On a
machine with other programs, the time of the CPU says more than the time of day; on a GPU it says nothing.

It writes `update_cost.json` and, as tables for `docs/performance.md`, `update_cost.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
import rows
import torch
from memory_and_speed import (
    LANGUAGE_LORA_TARGETS,
    LORA_RANK,
    LORA_TARGETS,
    StepTimer,
    build_dataset,
    build_model_config,
    build_processor_for,
    build_text_dataset,
    peak_bytes,
    peak_of_tensors,
    planned_bytes,
    reward,
    start_counting,
)
from operations import OperationCounter
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer

from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.planner.setup import GIB


# Name in the table, critic (`None`: TRL's trainer), with LoRA or without, the row to compare with.
ROWS = {
    "grpo": ("TRL GRPO", None, False, None),
    "sapo_none": ('SAPO, `critic="none"`', "none", False, "grpo"),
    "sapo_shared": ('SAPO, `critic="shared"`', "shared", False, "grpo"),
    "sapo_ladder": ('SAPO, `critic="ladder"`', "ladder", False, "grpo"),
    "sapo_separate": ('SAPO, `critic="separate"`', "separate", False, "grpo"),
    "grpo_lora": ("TRL GRPO, LoRA", None, True, None),
    "sapo_ladder_lora": ('SAPO, LoRA, `critic="ladder"`', "ladder", True, "grpo_lora"),
    "sapo_adapter": ('SAPO, LoRA, `critic="adapter"`', "adapter", True, "grpo_lora"),
}
MINI_BATCHES = 2


def lengths_of(rows: int, longest: int, seed: int = 0, same: bool = False) -> list[int]:
    """Log-normal lengths, with the spread of reasoning models' responses. A limit cuts the longest responses off."""
    if same:
        return [longest] * rows
    drawn = np.random.default_rng(seed).lognormal(np.log(longest / 5), 0.7, rows)
    return np.clip(drawn, 1, longest).astype(int).tolist()


def rollout_lengths(options: argparse.Namespace) -> list[int]:
    """Lengths of a rollout's responses with these options."""
    responses = options.micro_batch * options.accumulation * MINI_BATCHES
    return lengths_of(responses, options.completion_length, same=options.same_length)


def given_rollout(lengths: list[int]):
    """A `rollout_func` that returns responses of these lengths, with the same tokens each time."""

    def rollout(prompts: list, trainer: Any) -> dict[str, Any]:
        encoded = trainer.processing_class.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        generator = torch.Generator().manual_seed(0)
        # These tokens are letters, not special tokens.
        responses = [torch.randint(40, 200, (n,), generator=generator).tolist() for n in lengths[: len(prompts)]]
        return {
            "prompt_ids": [list(ids) for ids in encoded["input_ids"]],
            "completion_ids": responses,
            "logprobs": None,
        }

    return rollout


class TokenCounter:
    """Counts the tokens that go through a model's layers, including padding."""

    def __init__(self, backbone: torch.nn.Module):
        self.tokens = 0
        backbone.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.tokens += kwargs["input_ids"].numel()


def build_model(config: Qwen2_5_VLConfig, options: argparse.Namespace) -> PreTrainedModel:
    """The model with random weights; with `--text` its language model alone, as a Qwen2."""
    set_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        if not options.text:
            return Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=getattr(torch, options.dtype))
        text = config.text_config.to_dict()
        for name in ("model_type", "architectures", "rope_parameters", "layer_types"):
            text.pop(name, None)
        return Qwen2ForCausalLM._from_config(Qwen2Config(**text), dtype=getattr(torch, options.dtype))


def make_trainer(name: str, options: argparse.Namespace, callbacks: list[TrainerCallback]) -> GRPOTrainer:
    """The trainer of a row, with its model."""
    _, critic, lora, _ = ROWS[name]
    on_gpu = torch.cuda.is_available()
    processor = build_processor_for(options.image_size)
    model = build_model(build_model_config(options, processor.tokenizer), options)
    lengths = rollout_lengths(options)
    responses = len(lengths)
    targets = LANGUAGE_LORA_TARGETS if options.lora_layers == "language" else LORA_TARGETS
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": options.micro_batch,
        "gradient_accumulation_steps": options.accumulation,
        "num_generations": 2,
        "max_completion_length": options.completion_length,
        "max_steps": options.rollouts * MINI_BATCHES,
        "beta": 0.0,
        "learning_rate": 1e-6,
        "gradient_checkpointing": options.gradient_checkpointing,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    kwargs = {
        "model": model,
        "reward_funcs": reward,
        "train_dataset": (
            build_text_dataset(responses) if options.text else build_dataset(responses, options.image_size)
        ),
        "processing_class": processor.tokenizer if options.text else processor,
        "peft_config": LoraConfig(r=LORA_RANK, target_modules=targets) if lora else None,
        "callbacks": callbacks,
        "rollout_func": given_rollout(lengths),
    }
    if critic is None:
        args = GRPOConfig(**settings, steps_per_generation=options.accumulation * MINI_BATCHES)
        return GRPOTrainer(args=args, **kwargs)
    estimator = {"advantage_estimator": "group"} if critic == "none" else {}
    args = SAPOConfig(**settings, **estimator, critic=critic, num_mini_batches=MINI_BATCHES)
    return SAPOTrainer(args=args, **kwargs)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a few rollouts in this process, and measure their time."""
    timers = {"seconds": StepTimer(), "cpu_seconds": StepTimer(time.process_time)}
    make_trainer(name, options, list(timers.values())).train()
    return {what: statistics.median(seconds_of_rollouts(timer, options)) for what, timer in timers.items()}


def seconds_of_rollouts(timer: StepTimer, options: argparse.Namespace) -> list[float]:
    """Seconds of each rollout but the first, which also makes the optimizer's state and fills caches."""
    # A rollout's first step also scores it.
    rollouts = range(MINI_BATCHES, options.rollouts * MINI_BATCHES, MINI_BATCHES)
    return [sum(timer.seconds[first : first + MINI_BATCHES]) for first in rollouts]


def measure_all(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time, memory and padding of one training, and the planner's estimate: for a machine without other programs."""
    _, critic, lora, _ = ROWS[name]
    before = start_counting()
    timer = StepTimer()
    trainer = make_trainer(name, options, [timer])
    tokens = count_tokens(trainer, name)
    trainer.train()
    peak = peak_bytes() - before
    seconds = seconds_of_rollouts(timer, options)
    lengths = rollout_lengths(options)
    tokens_per_rollout = trainer.state.num_input_tokens_seen / options.rollouts
    prompt_tokens = round((tokens_per_rollout - sum(lengths)) / len(lengths))
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "tokens_per_second": tokens_per_rollout / statistics.median(seconds),
        "peak_bytes": peak,
        "planned_bytes": planned_bytes(critic, lora, options, prompt_tokens, MINI_BATCHES),
        "padding": padding(trainer, name, tokens),
        "prompt_tokens": prompt_tokens,
        "responses": {"number": len(lengths), "shortest": min(lengths), "longest": max(lengths)},
        "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
    }


def count(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Count the tensors' memory in two rollouts (the second has the optimizer's state), and operations in another."""
    before = start_counting()
    on_gpu = torch.cuda.is_available()
    memory = None if on_gpu else profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with memory or contextlib.nullcontext():
        trainer = make_trainer(name, with_rollouts(options, 2), [])
        tokens = count_tokens(trainer, name)
        trainer.train()
    return {
        "operations": count_operations(name, options),
        "peak_bytes": peak_bytes() - before if memory is None else peak_of_tensors(memory),
        "padding": padding(trainer, name, tokens),
    }


def count_tokens(trainer: GRPOTrainer, name: str) -> TokenCounter:
    """A counter of the tokens that go through the policy's layers from now on."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return TokenCounter((policy.get_base_model() if ROWS[name][2] else policy).base_model)


def padding(trainer: GRPOTrainer, name: str, computed: TokenCounter) -> float:
    """Share of padding among the tokens that a finished training computed."""
    # The policy scores each token once and trains on it once. An adapter critic does the same on the policy's layers.
    needed = trainer.state.num_input_tokens_seen * (4 if ROWS[name][1] == "adapter" else 2)
    return 1 - needed / computed.tokens


def count_operations(name: str, options: argparse.Namespace) -> int:
    """Operations of a row's rollout: scoring it, and training on it."""
    trainer = make_trainer(name, with_rollouts(options, 1), [])
    with OperationCounter() as counter:
        trainer.train()
    return counter.total


MEASUREMENTS = {"counts": count, "times": measure, "all": measure_all}
"""Measurements that the process of a row can make. `"all"` is for `on_gpu`, where each row trains once."""


def with_rollouts(options: argparse.Namespace, rollouts: int) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), "rollouts": rollouts})


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table, with the machine, the versions and the options."""
    options, counts, turns = report["options"], report["counts"], report["turns"]
    lines = [
        "| Trainer | operations, 10⁹ | peak GiB of tensors | padding | seconds | compared with | operations | tensors "
        "| CPU time, min / median / max | time, min / median / max |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, found in counts.items():
        title, _, _, against = ROWS[name]
        times = [turn[name] for turn in turns if name in turn]
        error = next((row["error"] for row in [found, *times] if "error" in row), None)
        if error is not None:
            lines.append(f"| {title} | {error.replace('|', ' ')} |{' |' * 8}")
            continue
        cells = [f"{found['operations'] / 1e9:.2f}", f"{found['peak_bytes'] / GIB:.3f}", f"{found['padding']:.1%}"]
        cells += [f"{statistics.median(row['seconds'] for row in times):.2f}" if times else ""]
        lines.append(f"| {title} | {' | '.join(cells + compared(report, name, against))} |")
    lora = {"all": "all linear layers", "language": "the language model's linear layers, with a frozen vision tower"}
    lengths = rollout_lengths(argparse.Namespace(**options))
    pictures = f"pictures of {options['image_size']} x {options['image_size']} pixels"
    lines += [
        "",
        f"{rows.described(report)}; rollouts of {len(lengths)} responses of {min(lengths)} to {max(lengths)} tokens "
        f"(mean {statistics.mean(lengths):.0f}), {MINI_BATCHES} optimizer steps each, micro-batches of "
        f"{options['micro_batch']}; {options['rollouts'] - 1} rollouts timed, {len(turns)} turns; "
        f"{'no pictures' if options['text'] else pictures}; gradient checkpointing "
        f"{'on' if options['gradient_checkpointing'] else 'off'}; LoRA of {lora[options['lora_layers']]}.",
    ]
    return "\n".join(lines) + "\n"


def compared(report: dict[str, Any], name: str, against: str | None) -> list[str]:
    """The other row's title, and the ratios to it: operations, tensors' peak, and both times turn by turn."""
    counts = report["counts"]
    if against is None or "error" in counts.get(against, {"error": "not counted"}):
        return [""] * 5
    ratios = [f"{counts[name][what] / counts[against][what]:.3f}" for what in ("operations", "peak_bytes")]
    turns = [turn for turn in report["turns"] if all("seconds" in turn.get(row, {}) for row in (name, against))]
    for what in ("cpu_seconds", "seconds"):
        times = [turn[name][what] / turn[against][what] for turn in turns]
        ratios.append(f"{min(times):.2f} / **{statistics.median(times):.2f}** / {max(times):.2f}" if times else "")
    return [ROWS[against][0], *ratios]


def parser() -> argparse.ArgumentParser:
    parser = rows.parser(__doc__, ROWS, micro_batch=4, accumulation=8, completion_length=2048)
    parser.add_argument(
        "--lora_layers",
        choices=("all", "language"),
        default="all",
        help="linear layers that LoRA rows adapt; with the language model's layers alone, the vision tower is frozen",
    )
    parser.add_argument(
        "--gradient_checkpointing", action=argparse.BooleanOptionalAction, help="by default only on a GPU"
    )
    parser.add_argument("--text", action="store_true", help="the language model alone, and prompts without pictures")
    parser.add_argument(
        "--turns", type=int, default=3, help="times of each row, in turn with the other rows; 0 only counts"
    )
    parser.add_argument("--rollouts", type=int, default=4, help="rollouts of a time; the first is not timed")
    parser.add_argument("--same_length", action="store_true", help="give all responses the longest length: no padding")
    parser.add_argument("--measure", choices=tuple(MEASUREMENTS), help=argparse.SUPPRESS)
    return parser


def complete(options: argparse.Namespace) -> None:
    """Fill in the options that depend on the machine."""
    options.dtype = options.dtype or rows.default_dtype()
    if options.gradient_checkpointing is None:
        options.gradient_checkpointing = torch.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print. Returns 1 if a row failed for another reason than memory."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(arguments)
    if options.rollouts < 2:
        parser().error(f"--rollouts must be at least 2, because the first is not timed; got {options.rollouts}")
    if options.text and options.lora_layers == "language":
        parser().error("--lora_layers language needs a vision tower to leave out: drop it, or drop --text")
    complete(options)
    if options.row is not None:
        return rows.measure_here(options, MEASUREMENTS[options.measure or "times"])
    report = rows.new_report(options) | {"counts": {}, "turns": []}
    report["options"].pop("measure")
    found = report["counts"]
    for turn in range(options.turns + 1):
        if turn:
            found = {}
            report["turns"].append(found)
        measurement = "times" if turn else "counts"
        for name, row in rows.measured(__file__, [*arguments, "--measure", measurement], options.rows):
            found[name] = row
            rows.write(report, options.out, "update_cost", as_markdown)
    print(as_markdown(report))
    return rows.exit_code(row for found in (report["counts"], *report["turns"]) for row in found.values())


if __name__ == "__main__":
    sys.exit(main())
