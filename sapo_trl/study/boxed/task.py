r"""Gates with the answer in a `\boxed{}`: solutions, tokenizer and warm start. The rest is the study task's."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import ProcessorMixin

from ... import embedded
from ...embedded import build_processor
from ...embedded.imitation import Schedule, fingerprint, imitate, save_once
from .. import task as study_task
from ..task import (
    ModelSize,
    Problem,
    TaskConfig,
    WarmStartConfig,
    WarmStartProgress,
    believed_cells,
    build_model,
    build_tokenizer,
    sample_problems,
    write_solution,
)
from ..task import longest_response as longest_chain
from ..task.problems import Split
from ..task.warm_start import VALIDATION_PROBLEMS, encode_solutions, line_accuracy


BOX = r"\boxed{"
"""One token of the tokenizer."""


def warm_start_config(seed: int = 0) -> WarmStartConfig:
    """
    The demo's warm start: four gates, 24 signs. The policy takes a quarter of the signs for the wrong cell.

    Args:
        seed (`int`, *optional*, defaults to `0`): decides the meanings of the signs and the initial weights.
    """
    task = TaskConfig(gates=4, signs=24, known=0.75, confidence=0.8, world=seed)
    return WarmStartConfig(task=task, size=ModelSize(layers=2), cooldown_steps=60)


def build_boxed_processor() -> ProcessorMixin:
    """The study task's processor, with one more token."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([BOX])
    return build_processor(tokenizer)


def boxed_solution(task: TaskConfig, problem: Problem, cells: str, *, rng: random.Random) -> str:
    """
    The study task's solution, and a last line with the numbers of the opened cells in a box.

    Args:
        task ([`~sapo_trl.study.task.TaskConfig`]):
            The task.
        problem ([`~sapo_trl.study.task.Problem`]):
            The problem.
        cells (`str`):
            The cell chosen at each gate.
        rng (`random.Random`):
            Source of the free words.
    """
    return f"{write_solution(task, problem, cells, rng=rng)}\n{BOX}{problem.code(cells)}}}"


def longest_response(task: TaskConfig) -> int:
    """Tokens of a well-formed response, its end included, and a few to spare."""
    return longest_chain(task) + task.gates + 3  # line break, box, numbers, closing brace


def warm_start(
    cache_dir: str | Path,
    config: WarmStartConfig | None = None,
    *,
    on_progress: Callable[[WarmStartProgress], None] | None = None,
) -> Path:
    """
    Train a model to imitate [`boxed_solution`]s, or find the result of an earlier call.

    Args:
        cache_dir (`str` or `Path`):
            Folder of finished warm starts, one folder each.
        config ([`~sapo_trl.study.task.WarmStartConfig`], *optional*):
            Settings; by default [`warm_start_config`]'s.
        on_progress (`Callable[[WarmStartProgress], None]`, *optional*):
            Called after every step of training.

    Returns:
        `Path`: Folder with the model and its processor, as `from_pretrained` loads them. Raises `RuntimeError` if the
        model has not learned the task's form within `max_steps`.
    """
    config = config or warm_start_config()
    code = [Path(module).parent for module in (__file__, study_task.__file__, embedded.__file__)]
    folder = Path(cache_dir) / f"boxed-{fingerprint(config, code)}"
    if folder.exists():
        return folder
    task, processor = config.task, build_boxed_processor()
    rng = random.Random(f"boxed {task.world}")

    def draw(n: int, split: Split = "train") -> dict[str, torch.Tensor]:
        problems = sample_problems(task, n, split=split, seed=rng.getrandbits(48))
        solutions = [boxed_solution(task, p, believed_cells(task, p, rng=rng), rng=rng) for p in problems]
        return encode_solutions(processor, task, problems, solutions, rng=rng)

    model = build_model(processor.tokenizer, size=config.size, seed=task.world)
    validation = draw(VALIDATION_PROBLEMS, "tune")
    accuracy, is_reached = imitate(
        model,
        Schedule(config.learning_rate, config.warmup_steps, config.cooldown_steps, config.max_steps),
        draw_batch=lambda cooling: draw(config.batch_size),
        measure=lambda: line_accuracy(model, validation, processor.tokenizer),
        is_reached=lambda accuracy: accuracy >= config.target,
        on_step=on_progress or (lambda news: None),
    )
    if not is_reached:
        raise RuntimeError(
            f"After {config.max_steps} steps the warm start of {task} writes {accuracy:.1%} of the lines as it should "
            f"(target {config.target:.1%}). Use another `world`, or raise `max_steps`."
        )
    save_once(folder, model, processor, config)
    return folder
