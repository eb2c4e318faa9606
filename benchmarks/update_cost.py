"""
Cost of scoring and updating with each of SAPO's critics, compared with TRL's GRPO on the same responses.

Both trainers get the same prompts with a picture each, and the same responses with log-normal lengths. Nothing is
generated and rewards take no time, so a step consists of scoring and updating. Each row is measured in a separate
process. Rows take turns, and a ratio compares two rows of the same turn. The model has random weights and Qwen2.5-VL's
shape. Nothing is downloaded.

    python benchmarks/update_cost.py --out results                   # Qwen2.5-VL-3B's shape, on a GPU
    python benchmarks/update_cost.py --size tiny --out results       # a tiny model, on a CPU too

On a GPU, memory means the tensors' memory. On a CPU it is the growth of the process, which includes memory kept by its
allocator. `--count_tensors` counts tensors on a CPU, too. It uses PyTorch's profiler, which makes steps slower.

It writes `update_cost.json` and, as tables for `docs/performance.md`, `update_cost.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
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
    peak_bytes,
    peak_of_tensors,
    reward,
    start_counting,
)
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2_5_VLForConditionalGeneration, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.planner.setup import GIB


# Name in the table, critic (`None`: TRL's trainer), with LoRA or without, the row to compare with.
ROWS = {
    "grpo": ("TRL GRPO", None, False, None),
    "sapo_none": ('SAPO, `critic="none"`', "none", False, "grpo"),
    "sapo_shared": ('SAPO, `critic="shared"`', "shared", False, "grpo"),
    "sapo_separate": ('SAPO, `critic="separate"`', "separate", False, "grpo"),
    "grpo_lora": ("TRL GRPO, LoRA", None, True, None),
    "sapo_adapter": ('SAPO, LoRA, `critic="adapter"`', "adapter", True, "grpo_lora"),
}
MINI_BATCHES = 2


def lengths_of(rows: int, longest: int, seed: int = 0, same: bool = False) -> list[int]:
    """Log-normal lengths, with the spread of reasoning models' responses. A limit cuts the longest responses off."""
    if same:
        return [longest] * rows
    drawn = np.random.default_rng(seed).lognormal(np.log(longest / 5), 0.7, rows)
    return np.clip(drawn, 1, longest).astype(int).tolist()


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


def make_trainer(name: str, options: argparse.Namespace, callbacks: list[TrainerCallback]) -> GRPOTrainer:
    """The trainer of a row, with its model."""
    _, critic, lora, _ = ROWS[name]
    on_gpu = torch.cuda.is_available()
    processor = build_processor_for(options.image_size)
    config = build_model_config(options, processor.tokenizer)
    set_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=getattr(torch, options.dtype))
    responses = options.micro_batch * options.accumulation * MINI_BATCHES
    lengths = lengths_of(responses, options.completion_length, same=options.same_length)
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
        "train_dataset": build_dataset(responses, options.image_size),
        "processing_class": processor,
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
    """Train a few steps in this process, and measure their memory and time."""
    _, critic, lora, _ = ROWS[name]
    timer, before = StepTimer(), start_counting()
    memory = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if options.count_tensors else None
    with memory or contextlib.nullcontext():
        trainer = make_trainer(name, options, [timer])
        policy = trainer.accelerator.unwrap_model(trainer.model)
        counter = TokenCounter((policy.get_base_model() if lora else policy).base_model)
        trainer.train()
    # A rollout's first step also scores it. The first rollout also makes the optimizer's state and fills caches.
    rollouts = range(MINI_BATCHES, len(timer.seconds), MINI_BATCHES)
    seconds = [sum(timer.seconds[first : first + MINI_BATCHES]) for first in rollouts]
    # The policy scores each token once and trains on it once. An adapter critic does the same on the policy's layers.
    needed = trainer.state.num_input_tokens_seen * (4 if critic == "adapter" else 2)
    return {
        "seconds": statistics.median(seconds),
        "peak_bytes": peak_bytes() - before if memory is None else peak_of_tensors(memory),
        "padding": 1 - needed / counter.tokens,
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table, with the machine, the versions and the options."""
    options, turns = report["options"], report["turns"]
    lines = [
        "| Trainer | seconds per rollout | padding | peak GiB | compared with | time, min / median / max | memory |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for name in turns[0]:
        title, _, _, against = ROWS[name]
        found = [turn[name] for turn in turns]
        error = next((row["error"] for row in found if "error" in row), None)
        if error is not None:
            lines.append(f"| {title} | {error.replace('|', ' ')} | | | | | |")
            continue
        seconds = statistics.median(row["seconds"] for row in found)
        peak = statistics.median(row["peak_bytes"] for row in found)
        cells = [f"{seconds:.2f}", f"{found[0]['padding']:.1%}", f"{peak / GIB:.2f}", "", "", ""]
        others = [turn.get(against, {"error": "not measured"}) for turn in turns]
        if against is not None and not any("error" in other for other in others):
            time = [row["seconds"] / other["seconds"] for row, other in zip(found, others, strict=True)]
            memory = statistics.median(
                row["peak_bytes"] / other["peak_bytes"] for row, other in zip(found, others, strict=True)
            )
            spread = f"{min(time):.2f} / **{statistics.median(time):.2f}** / {max(time):.2f}"
            cells[3:] = [ROWS[against][0], spread, f"{memory:.2f}"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    memory = "of the process, without the memory of imports"
    if report["on_gpu"] or options["count_tensors"]:
        memory = "of tensors"
    lora = {"all": "all linear layers", "language": "the language model's linear layers, with a frozen vision tower"}
    responses = options["micro_batch"] * options["accumulation"] * MINI_BATCHES
    lengths = lengths_of(responses, options["completion_length"], same=options["same_length"])
    lines += [
        "",
        f"{rows.described(report)}; rollouts of {responses} responses of {min(lengths)} to {max(lengths)} tokens "
        f"(mean {statistics.mean(lengths):.0f}), {MINI_BATCHES} optimizer steps each, micro-batches of "
        f"{options['micro_batch']}; {options['rollouts'] - 1} rollouts timed, {len(turns)} turns; pictures of "
        f"{options['image_size']} x {options['image_size']} pixels; gradient checkpointing "
        f"{'on' if options['gradient_checkpointing'] else 'off'}; LoRA of {lora[options['lora_layers']]}. Peak memory "
        f"is the peak {memory}.",
    ]
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--turns", type=int, default=3, help="measurements of each row, in turn with the other rows")
    parser.add_argument("--rollouts", type=int, default=4, help="number of rollouts; the first is not timed")
    parser.add_argument("--count_tensors", action="store_true", help="on a CPU: count tensors instead of the process")
    parser.add_argument("--same_length", action="store_true", help="give all responses the longest length: no padding")
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
    complete(options)
    if options.row is not None:
        return rows.measure_here(options, measure)
    report = rows.new_report(options) | {"turns": []}
    for _ in range(options.turns):
        report["turns"].append(dict(rows.measured(__file__, arguments, options.rows)))
        rows.write(report, options.out, "update_cost", as_markdown)
    print(as_markdown(report))
    return rows.exit_code(row for turn in report["turns"] for row in turn.values())


if __name__ == "__main__":
    sys.exit(main())
