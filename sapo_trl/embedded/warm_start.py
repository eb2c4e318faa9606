"""The supervised warm start: from random weights to a policy that reads well and makes arithmetic slips."""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import ProcessorMixin, Qwen2_5_VLForConditionalGeneration

from .drawing import draw_quadrilateral
from .evaluation import encode_prompts
from .imitation import IGNORED_LABEL, ImitationStep, Schedule, append_solutions, fingerprint, imitate, save_once
from .model import build_model
from .problems import SIDES, Problem, sample_problems
from .processor import build_processor
from .solutions import reference_solution


READING_TOKENS = 4
"""A reading such as `AB=7` and its newline; its third token is the length."""

VALIDATION_PROBLEMS = 128


@dataclass(frozen=True)
class WarmStartConfig:
    """
    Settings of the warm start.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights, of the problems and of the errors in their solutions.
        problems (`int`, *optional*, defaults to `4000`):
            Training problems. Their pictures and the errors in their solutions are drawn anew every time.
        batch_size (`int`, *optional*, defaults to `32`):
            Problems per step.
        learning_rate (`float`, *optional*, defaults to `2e-3`):
            Peak learning rate of AdamW.
        warmup_steps (`int`, *optional*, defaults to `30`):
            Steps of linear warm-up.
        cooldown_steps (`int`, *optional*, defaults to `100`):
            Steps of linear decay, to 5 % of the peak, that begin once the targets are reached.
        max_steps (`int`, *optional*, defaults to `1000`):
            Steps within which the targets must be reached; beyond them the warm start fails.
        target_reading_accuracy (`float`, *optional*, defaults to `0.98`):
            Share of lengths, in pictures not trained on, that the model must read right.
        target_solved (`float`, *optional*, defaults to `0.7`):
            Share of problems not trained on that the model must solve without any error.
        error_rate (`float`, *optional*, defaults to `0.3`):
            Probability that a sum is wrong in the solutions of the cooldown. Reinforcement learning can remove these
            errors.
    """

    seed: int = 0
    problems: int = 4000
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 30
    cooldown_steps: int = 100
    max_steps: int = 1000
    target_reading_accuracy: float = 0.98
    target_solved: float = 0.7
    error_rate: float = 0.3


@dataclass(frozen=True)
class WarmStartProgress:
    """Argument of the progress callback after every step. Accuracies are measured every 20 steps until cooldown."""

    step: int
    loss: float
    reading_accuracy: float
    solved: float
    cooldown_steps_left: int | None
    """`None` before the cooldown."""


def warm_start(
    cache_dir: str | Path,
    config: WarmStartConfig | None = None,
    *,
    on_progress: Callable[[WarmStartProgress], None] | None = None,
) -> Path:
    """
    Train the embedded model to imitate [`reference_solution`]s, or find the result of an earlier call.

    Args:
        cache_dir (`str` or `Path`):
            Folder of finished warm starts, one folder each.
        config ([`WarmStartConfig`], *optional*):
            Settings. With others, with other versions of the libraries or with other code, another model is trained.
        on_progress (`Callable[[WarmStartProgress], None]`, *optional*):
            Called after every step of training.

    Returns:
        `Path`: Folder that `AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained` load.
        Raises `RuntimeError` if the model has not learned to read within `max_steps`.
    """
    config = config or WarmStartConfig()
    folder = warm_start_folder(cache_dir, config)
    if folder.exists():
        return folder
    processor = build_processor()
    model = build_model(processor.tokenizer, seed=config.seed)
    train(model, processor, config, on_progress)
    save_once(folder, model, processor, config)
    return folder


def warm_start_folder(cache_dir: str | Path, config: WarmStartConfig | None = None) -> Path:
    """The folder of a warm start, which exists once the model is trained. The arguments are [`warm_start`]'s."""
    return Path(cache_dir) / f"embedded-{fingerprint(config or WarmStartConfig(), [Path(__file__).parent])}"


def save_untrained(folder: str | Path, seed: int = 0) -> None:
    """
    Save the embedded model with random weights, and its processor.

    Args:
        folder (`str` or `Path`): where to.
        seed (`int`, *optional*, defaults to `0`): seed of the weights.
    """
    processor = build_processor()
    build_model(processor.tokenizer, seed=seed).save_pretrained(folder)
    processor.save_pretrained(folder)


def default_cache_dir() -> Path:
    """`$SAPO_TRL_CACHE` if set, else `~/.cache/sapo_trl`."""
    return Path(os.environ.get("SAPO_TRL_CACHE") or "~/.cache/sapo_trl").expanduser()


def train(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: ProcessorMixin,
    config: WarmStartConfig,
    on_progress: Callable[[WarmStartProgress], None] | None = None,
) -> None:
    """
    Train in place: on right solutions until the model reads and adds, then on solutions with errors while it cools
    down.

    Reading comes suddenly, between steps 100 and 400 depending on the seed. So neither the length nor the schedule of
    the learning rate can be fixed beforehand. Right sums come first, because sums that are right only most of the time
    take far longer to learn. Errors are learned quickly.
    """
    rng = random.Random(config.seed)
    problems = sample_problems(config.problems + VALIDATION_PROBLEMS, seed=config.seed)
    validation = encode_solutions(processor, problems[config.problems :], rng=rng)
    batches = _batches(problems[: config.problems], config.batch_size, rng)

    def draw_batch(cooling: bool) -> dict[str, torch.Tensor]:
        error_rate = config.error_rate if cooling else 0.0
        return encode_solutions(processor, next(batches), rng=rng, error_rate=error_rate)

    def on_step(news: ImitationStep[tuple[float, float]]) -> None:
        if on_progress is not None:
            on_progress(WarmStartProgress(news.step, news.loss, *news.accuracy, news.cooldown_steps_left))

    (reading, solved), is_reached = imitate(
        model,
        Schedule(config.learning_rate, config.warmup_steps, config.cooldown_steps, config.max_steps),
        draw_batch=draw_batch,
        measure=lambda: validation_accuracy(model, validation),
        is_reached=lambda found: found[0] >= config.target_reading_accuracy and found[1] >= config.target_solved,
        on_step=on_step,
    )
    if not is_reached:
        raise RuntimeError(
            f"After {config.max_steps} steps the warm start with seed={config.seed} reads {reading:.1%} of the "
            f"lengths (target {config.target_reading_accuracy:.1%}) and solves {solved:.1%} of the problems (target "
            f"{config.target_solved:.1%}). Use another `seed`, or raise `max_steps`."
        )


def encode_solutions(
    processor: ProcessorMixin, problems: list[Problem], *, rng: random.Random, error_rate: float = 0.0
) -> dict[str, torch.Tensor]:
    """
    Encode problems with their solutions, laid out as in a rollout: left-padded prompts, right-padded responses.

    Returns:
        `dict[str, torch.Tensor]`: The model's inputs, and `labels` that are -100 outside the response.
    """
    rows = [
        {"images": [draw_quadrilateral(p.lengths, rng)], "problem": f"<image>{p.question}", "answer": p.answer}
        for p in problems
    ]
    solutions = [reference_solution(p, error_rate=error_rate, rng=rng) for p in problems]
    return append_solutions(encode_prompts(processor, rows), solutions, processor.tokenizer)


@torch.no_grad()
def validation_accuracy(
    model: Qwen2_5_VLForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """
    Compare the model's likeliest tokens, each given the right ones before it, with solutions from
    [`encode_solutions`].

    Returns:
        `tuple[float, float]`: The share of lengths read right, and the share of solutions that are right from the
        first token to the last, which is the greedy accuracy.
    """
    labels = batch["labels"]
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}, use_cache=False).logits
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == IGNORED_LABEL)
    response_start = batch["input_ids"].shape[1] - int((labels != IGNORED_LABEL).sum(1).max())
    lengths = [response_start + READING_TOKENS * side + 2 for side in range(len(SIDES))]
    return right[:, [position - 1 for position in lengths]].double().mean().item(), right.all(1).double().mean().item()


def _batches(problems: list[Problem], batch_size: int, rng: random.Random) -> Iterator[list[Problem]]:
    while True:
        shuffled = rng.sample(problems, len(problems))
        for i in range(0, len(shuffled) - batch_size + 1, batch_size):
            yield shuffled[i : i + batch_size]
