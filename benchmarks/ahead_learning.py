"""
Accuracy after training with and without `rollouts_ahead`, on the embedded task, with equal numbers of responses.

Each run starts from the same warm start and gets its responses from `stand_in.py` with the real model: over HTTP, with
pictures, from the weights that it was sent. So at age 1 they really come from the policy before the last update.

    python benchmarks/ahead_learning.py --seeds 0 1 2 3 4 --out benchmarks/results

Finished runs are kept in `--runs` and not repeated.
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
from rows import machine
from transformers import AutoModelForImageTextToText

from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.data import to_prompts
from sapo_trl.embedded import default_cache_dir, evaluate, load_processor, make_problems, warm_start
from sapo_trl.generation import VLLMServerRollout
from sapo_trl.rewards import accuracy_reward


PRESETS: dict[str, dict[str, Any]] = {
    "sapo": {"critic_learning_rate": 3e-4, "num_generations": 1},
    "grpo": {"num_generations": 8},
    "sao": {"critic_learning_rate": 3e-4, "critic_warmup_steps": 2},
}
"""Settings of each preset besides the common ones. A warm-up of the critic must be shorter than so short a run."""


UNIMPORTANT = ("presets", "seeds", "out", "cache", "runs")
"""Options that do not change a run."""


def run(preset: str, ahead: int, seed: int, options: argparse.Namespace, start: Path) -> dict[str, Any]:
    """Train once. Returns accuracy, times and measurements of the sampler."""
    processor = load_processor(start)
    problems = make_problems(options.rollouts * options.responses, seed=seed)
    settings = PRESETS[preset]
    prompts = problems.select(range(options.rollouts * options.responses // settings.get("num_generations", 1)))
    with tempfile.TemporaryDirectory() as folder, stand_in.running("--model", str(start)) as url:
        args = SAPOConfig.from_preset(
            preset,
            folder,
            **settings,
            rollouts_ahead=ahead,
            vllm_importance_sampling_mode=options.mode,
            max_steps=options.rollouts * options.mini_batches,
            num_mini_batches=options.mini_batches,
            per_device_train_batch_size=options.responses // options.mini_batches,
            gradient_accumulation_steps=1,
            max_completion_length=64,
            learning_rate=options.learning_rate,
            beta=0.0,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            logging_steps=options.mini_batches,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )
        trainer = SAPOTrainer(
            model=AutoModelForImageTextToText.from_pretrained(start),
            reward_funcs=accuracy_reward,
            args=args,
            train_dataset=to_prompts(prompts),
            processing_class=processor,
            rollout_func=VLLMServerRollout(url, Path(folder) / "weights", start_timeout=300),
        )
        began = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - began
    found = evaluate(trainer.model, processor, make_problems(options.problems, split="test"), seed=seed)
    logged = trainer.state.log_history

    def column(name: str) -> list[float]:
        return [entry[name] for entry in logged if name in entry]

    return {
        "accuracy": sum(found.correct) / len(found.correct),
        "reward": column("reward"),
        "age": column("sampling/age"),
        "difference": column("sampling/sampling_logp_difference/mean"),
        "seconds": seconds,
    }


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "| preset | age | seeds | accuracy | of each seed | mean difference of log-probabilities |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (preset, ahead), runs in grouped(report["runs"]).items():
        accuracies = [run["accuracy"] for run in runs]
        gap = statistics.mean(statistics.mean(run["difference"]) for run in runs)
        each = ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)
        lines.append(
            f"| `{preset}` | {ahead} | {len(runs)} | {statistics.mean(accuracies):.3f} | {each} | {gap:.4f} |"
        )
    return "\n".join(lines) + "\n"


def grouped(runs: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for found in runs:
        groups.setdefault((found["preset"], found["ahead"]), []).append(found)
    return groups


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rollouts", type=int, default=14)
    parser.add_argument("--responses", type=int, default=256, help="of a rollout")
    parser.add_argument("--mini_batches", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--mode", default="token_truncate", help="vllm_importance_sampling_mode")
    parser.add_argument("--problems", type=int, default=1024, help="unseen ones, to measure the accuracy")
    parser.add_argument("--cache", type=Path, default=default_cache_dir(), help="folder of warm starts")
    parser.add_argument("--runs", type=Path, default=Path("outputs/ahead_learning"), help="folder of finished runs")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    start = warm_start(options.cache)
    options.runs.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(options).items() if name not in UNIMPORTANT}
    report: dict[str, Any] = {"machine": machine(), "settings": settings, "runs": []}
    for seed in options.seeds:
        for preset in options.presets:
            for ahead in (0, 1):
                kept = options.runs / f"{preset}-{ahead}-{seed}.json"
                if not kept.is_file():
                    found = run(preset, ahead, seed, options, start)
                    kept.write_text(json.dumps({"settings": settings, **found}))
                found = json.loads(kept.read_text())
                if found.pop("settings") != settings:
                    parser.error(f"{kept} was made with other settings: choose another folder for `--runs`.")
                found |= {"preset": preset, "ahead": ahead, "seed": seed}
                report["runs"].append(found)
                print(json.dumps(found), file=sys.stderr, flush=True)
                if options.out is not None:
                    options.out.mkdir(parents=True, exist_ok=True)
                    (options.out / "ahead_learning.json").write_text(json.dumps(report, indent=2) + "\n")
                    (options.out / "ahead_learning.md").write_text(as_markdown(report))
    print(as_markdown(report), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
