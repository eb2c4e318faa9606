"""
Where the time of a training step goes: the model's forwards and backwards, the optimizers, and everything else.

The set-up is the same as in `update_cost.py`: responses of log-normal lengths are given, so nothing is generated.

    python benchmarks/profile_step.py --row sapo_separate --out results                 # on a GPU
    python benchmarks/profile_step.py --row sapo_separate --size tiny --out results     # on a CPU too

It writes `profile_ROW.json` and prints a table. The optimizers' share includes the clipping of gradients. Datasets'
code reads rows, and transformers' code cuts images into patches. Everything else is segmentation, advantages, losses,
metrics, collation, logging and transformers' own loop. With a GPU the program waits for the device at each border
between two stages, so that work counts for the stage that started it. This makes a step somewhat slower.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from memory_and_speed import StepTimer, now
from rows import machine
from transformers import TrainerCallback
from update_cost import MINI_BATCHES, ROWS, complete, make_trainer
from update_cost import parser as update_cost_parser


class Stages(TrainerCallback):
    """Seconds by stage, from the second rollout on. Time in nested stages counts for the outermost stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._inside = False
        self._counts = False

    def on_step_end(self, args, state, control, **kwargs):
        self._counts = state.global_step >= MINI_BATCHES

    @contextmanager
    def stage(self, name: str):
        if self._inside:
            yield
            return
        self._inside, started = True, now()
        try:
            yield
        finally:
            self._inside = False
            if self._counts:
                self.seconds[name] = self.seconds.get(name, 0.0) + now() - started

    def timed(self, name: str | Callable[[], str], function: Callable) -> Callable:
        @functools.wraps(function)  # callers read its signature
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name if isinstance(name, str) else name()):
                return function(*args, **kwargs)

        return wrapper


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """Train a few rollouts, and measure the time of each stage."""
    stages, timer = Stages(), StepTimer()
    trainer = make_trainer(options.row, options, [stages, timer])

    def forward_of(who: str) -> Callable[[], str]:
        return lambda: f"{who}, forward to {'train' if torch.is_grad_enabled() else 'score'}"

    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy.forward = stages.timed(forward_of("policy"), policy.forward)
    towers = [(policy.get_base_model() if hasattr(policy, "peft_config") else policy).base_model]
    critic = getattr(trainer, "critic", None)
    if critic is not None and critic.module is not None:
        towers += [critic.module.backbone] if critic.module.backbone is not None else []
        critic.module.forward = stages.timed(forward_of("critic"), critic.module.forward)
        # The critic has its own functions: it uses neither accelerate's backward nor the trainer's optimizer.
        critic.backward = stages.timed("critic, backward", critic.backward)
        critic.clip_gradient = stages.timed("optimizers", critic.clip_gradient)
        critic.step = stages.timed("optimizers", critic.step)
    for backbone in towers:
        # A frozen tower computes an image's features once per rollout. Otherwise the tower is part of the forward.
        backbone.get_image_features = stages.timed("frozen vision tower", backbone.get_image_features)
    trainer.accelerator.backward = stages.timed("policy, backward", trainer.accelerator.backward)
    trainer.accelerator.clip_grad_norm_ = stages.timed("optimizers", trainer.accelerator.clip_grad_norm_)
    create_optimizer = trainer.create_optimizer

    def create_timed_optimizer(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = create_optimizer(*args, **kwargs)
        optimizer.step = stages.timed("optimizers", optimizer.step)
        return optimizer

    trainer.create_optimizer = create_timed_optimizer
    trainer.get_batch_samples = stages.timed("reading rows", trainer.get_batch_samples)
    image_processor = trainer.processing_class.image_processor
    image_processor.preprocess = stages.timed("images to patches", image_processor.preprocess)
    trainer.train()
    total = sum(timer.seconds[MINI_BATCHES:])
    rollouts = options.rollouts - 1
    seconds = {name: value / rollouts for name, value in sorted(stages.seconds.items(), key=lambda item: -item[1])}
    seconds["everything else"] = total / rollouts - sum(seconds.values())
    return {"row": options.row, "machine": machine(), "seconds_per_rollout": total / rollouts, "stages": seconds}


def main(argv: list[str] | None = None) -> int:
    """Profile, write, print."""
    parser = update_cost_parser()
    parser.description = __doc__
    parser.set_defaults(row="sapo_separate")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if options.rollouts < 2:
        parser.error(f"--rollouts must be at least 2, because the first one is not counted; got {options.rollouts}")
    complete(options)
    found = profile(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (Path(options.out) / f"profile_{options.row}.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"{ROWS[options.row][0]}, {found['machine']}: {found['seconds_per_rollout']:.2f} s per rollout\n")
    print("| stage | seconds | share |\n| --- | ---: | ---: |")
    for name, seconds in found["stages"].items():
        print(f"| {name} | {seconds:.3f} | {seconds / found['seconds_per_rollout']:.1%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
