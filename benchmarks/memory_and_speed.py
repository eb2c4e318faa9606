"""
Peak memory and speed of a few training steps: SAPO with each learned critic, and TRL's GRPO on a batch of equal shape.

Each row of the table is measured in a separate process. The model has random weights and Qwen2.5-VL's shape. Each
prompt has one image, and all responses have the same length. There is no reference model. Nothing is downloaded.

    python benchmarks/memory_and_speed.py --out results                  # Qwen2.5-VL-3B's shape, on a GPU
    python benchmarks/memory_and_speed.py --size tiny --out results      # a tiny model, on a CPU too

It writes `memory_and_speed.json` and, as a table for `docs/scaling.md`, `memory_and_speed.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import rows
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from torch.profiler import profile
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, TrainerCallback, set_seed
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOConfig, GRPOTrainer

from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.embedded import build_config, build_processor, build_tokenizer
from sapo_trl.planner import Lora, Setup, plan_memory
from sapo_trl.planner.setup import GIB
from sapo_trl.planner.shapes import PUBLISHED


# Name in the table, critic (`None`: TRL's trainer), with LoRA or without.
ROWS = {
    "sapo_separate": ('SAPO, `critic="separate"`', "separate", False),
    "sapo_ladder": ('SAPO, `critic="ladder"`', "ladder", False),
    "sapo_shared": ('SAPO, `critic="shared"`', "shared", False),
    "sapo_adapter": ('SAPO, LoRA, `critic="adapter"`', "adapter", True),
    "grpo": ("TRL GRPO", None, False),
    "grpo_lora": ("TRL GRPO, LoRA", None, True),
}
LORA_RANK, LORA_TARGETS = 16, "all-linear"
LANGUAGE_LORA_TARGETS = r".*language_model\..*_proj"


def build_model_config(options: argparse.Namespace, tokenizer: Any) -> Qwen2_5_VLConfig:
    """A configuration of the requested shape with the tokenizer's special tokens. Its vocabulary may be larger."""
    if options.size == "tiny":
        config = build_config(tokenizer)
        config.text_config.vocab_size = 1024
    else:
        config = PUBLISHED["Qwen/Qwen2.5-VL-3B-Instruct"]()
    if options.hidden_size is not None:
        config.text_config.hidden_size = config.vision_config.out_hidden_size = options.hidden_size
        config.text_config.intermediate_size = 3 * options.hidden_size
        config.text_config.num_attention_heads = options.hidden_size // 32
        config.text_config.num_key_value_heads = options.hidden_size // 32
    if options.layers is not None:
        config.text_config.num_hidden_layers = options.layers
        config.text_config.layer_types = config.text_config.layer_types[:1] * options.layers
    token_id = tokenizer.convert_tokens_to_ids
    config.image_token_id, config.video_token_id = token_id("<|image_pad|>"), token_id("<|video_pad|>")
    config.vision_start_token_id, config.vision_end_token_id = token_id("<|vision_start|>"), token_id("<|vision_end|>")
    config.text_config.bos_token_id = None
    config.text_config.eos_token_id, config.text_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return config


def build_processor_for(image_size: int) -> Any:
    """Qwen2.5-VL's processor, with limits that leave pictures of this size unchanged."""
    processor = build_processor(build_tokenizer())
    size = {"shortest_edge": 28 * 28, "longest_edge": image_size**2}
    processor.image_processor = Qwen2VLImageProcessorPil(size=size)
    return processor


QUESTION = "Find the length of AB in the figure. " * 8


def build_dataset(rows: int, image_size: int) -> Dataset:
    """Prompts with one picture each. Every picture has another colour."""
    pictures = [Image.new("RGB", (image_size, image_size), (13 * i % 256, 7 * i % 256, 99)) for i in range(rows)]
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompts = [[{"role": "user", "content": content}]] * rows
    return Dataset.from_dict({"prompt": prompts, "images": [[picture] for picture in pictures]})


def build_text_dataset(rows: int) -> Dataset:
    """The same prompts without pictures."""
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": QUESTION}]] * rows})


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward that varies, and takes no time."""
    return [(sum(ids) % 7) / 7 for ids in completion_ids]


class StepTimer(TrainerCallback):
    """
    Seconds of each optimizer step since the end of the last step, including loading of rows and the rollout.

    Args:
        clock (`Callable`, *optional*): returns seconds; by default the time of day, after the GPU's work.
    """

    def __init__(self, clock: Callable[[], float] | None = None):
        self.seconds: list[float] = []
        self._clock = clock or now
        self._ended = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._ended = self._clock()

    def on_step_end(self, args, state, control, **kwargs):
        before, self._ended = self._ended, self._clock()
        self.seconds.append(self._ended - before)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps in this process, and measure their memory and time."""
    _, critic, lora = ROWS[name]
    on_gpu = torch.cuda.is_available()
    processor = build_processor_for(options.image_size)
    config = build_model_config(options, processor.tokenizer)
    before = start_counting()
    set_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=getattr(torch, options.dtype))
    responses = options.micro_batch * options.accumulation
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": options.micro_batch,
        "gradient_accumulation_steps": options.accumulation,
        "num_generations": 2,
        "max_completion_length": options.completion_length,
        "generation_kwargs": {"min_new_tokens": options.completion_length},
        "max_steps": options.steps,
        "beta": 0.0,
        "learning_rate": 1e-6,
        "gradient_checkpointing": True,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    timer = StepTimer()
    kwargs = {
        "model": model,
        "reward_funcs": reward,
        "train_dataset": build_dataset(max(responses, 4), options.image_size),
        "processing_class": processor,
        "peft_config": LoraConfig(r=LORA_RANK, target_modules=LORA_TARGETS) if lora else None,
        "callbacks": [timer],
    }
    if critic is None:
        trainer = GRPOTrainer(args=GRPOConfig(**settings), **kwargs)
    else:
        trainer = SAPOTrainer(args=SAPOConfig(**settings, critic=critic, num_mini_batches=1), **kwargs)
    trainer.train()
    tokens = trainer.state.num_input_tokens_seen / options.steps
    peak = peak_bytes() - before
    # The first step also makes the optimizer's state, compiles kernels and fills caches.
    seconds = statistics.median(timer.seconds[1:])
    prompt_tokens = round(tokens / responses) - options.completion_length
    return {
        "peak_bytes": peak,
        "planned_bytes": planned_bytes(critic, lora, options, prompt_tokens),
        "seconds_per_step": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_step": tokens,
        "prompt_tokens": prompt_tokens,
    }


def start_counting() -> int:
    """Start measuring the peak. Returns the bytes at the start: 0 on a GPU, otherwise the process's memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return 0
    # Reset the process's peak, because imports need more memory than they keep. Not every system can do that.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The peak since then: of tensors on the GPU, or, without a GPU, of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_of_tensors(counter: profile) -> int:
    """The largest number of bytes in CPU tensors at one time, from a profiler that counted allocations."""
    events = [event for event in counter.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = np.array([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(changes.cumsum().max())


def planned_bytes(
    critic: str | None, lora: bool, options: argparse.Namespace, prompt_tokens: int, mini_batches: int = 1
) -> float:
    """The planner's estimate for a row, without its allowance for memory outside tensors."""
    tokenizer = build_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        build_model_config(options, tokenizer).save_pretrained(folder)
        plan = plan_memory(
            Setup(
                model=folder,
                micro_batch=options.micro_batch,
                accumulation=options.accumulation,
                mini_batches=mini_batches,
                prompt_length=prompt_tokens,
                image_tokens=(options.image_size // 28) ** 2,
                completion_length=options.completion_length,
                critic=critic or "none",
                gradient_checkpointing=getattr(options, "gradient_checkpointing", True),
                beta=0.0,
                weight_bytes=getattr(torch, options.dtype).itemsize,
                mixed_precision=torch.cuda.is_available(),
                lora=Lora(LORA_RANK, LORA_TARGETS) if lora else None,
            )
        )
    return plan.total - plan.resident["overhead"]


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table, with the machine, the versions and the options."""
    options = report["options"]
    peak = "peak GiB (tensors)" if report["on_gpu"] else "peak GiB (process, without imports)"
    lines = [
        f"| Trainer | {peak} | planner GiB | seconds per step | tokens per second |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in report["rows"].items():
        title = ROWS[name][0]
        if "error" in row:
            lines.append(f"| {title} | {row['error'].replace('|', ' ')} | | | |")
            continue
        sizes = f"{row['peak_bytes'] / GIB:.2f} | {row['planned_bytes'] / GIB:.2f}"
        lines.append(f"| {title} | {sizes} | {row['seconds_per_step']:.2f} | {row['tokens_per_second']:.0f} |")
    lines += [
        "",
        f"{rows.described(report)}, {options['micro_batch']} x {options['accumulation']} responses of "
        f"{options['completion_length']} tokens per step, pictures of {options['image_size']} x "
        f"{options['image_size']} pixels, {options['steps']} steps. With one optimizer step per rollout, TRL's "
        "trainer takes the old log-probabilities from the update's own forward. "
        "SAPO always scores a rollout first, because it cuts and values the rollout before the update.",
    ]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    parser = rows.parser(__doc__, ROWS, micro_batch=2, accumulation=4, completion_length=512)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps; the first is not timed")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print. Returns 1 if a row failed for another reason than memory."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(arguments)
    if options.steps < 2:
        parser().error(f"--steps must be at least 2, because the first is not timed; got {options.steps}")
    if options.image_size % 28:
        parser().error(f"--image_size must be a multiple of 28, got {options.image_size}")
    options.dtype = options.dtype or rows.default_dtype()
    if options.row is not None:
        return rows.measure_here(options, measure)
    report = rows.new_report(options) | {"rows": {}}
    for name, found in rows.measured(__file__, arguments, options.rows):
        report["rows"][name] = found
        rows.write(report, options.out, "memory_and_speed", as_markdown)
    print(as_markdown(report))
    return rows.exit_code(report["rows"].values())


if __name__ == "__main__":
    sys.exit(main())
