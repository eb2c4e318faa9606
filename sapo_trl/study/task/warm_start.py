"""The supervised warm start: from random weights to a policy that reads well and has beliefs about the signs."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ... import embedded
from ...embedded import build_processor
from ...embedded.imitation import IGNORED_LABEL, Schedule, append_solutions, imitate, save_once
from ...embedded.imitation import ImitationStep as WarmStartProgress
from ...embedded.imitation import fingerprint as code_fingerprint
from .config import TaskConfig
from .drawing import draw_cells
from .model import ModelSize, build_model
from .problems import Problem, Split, question, sample_problems
from .prompts import encode_prompts
from .solutions import believed_cells, believed_numbers, write_solution
from .tokenizer import build_tokenizer
from .vocabulary import CELLS, FILLER_WORDS


VALIDATION_PROBLEMS = 64


@dataclass(frozen=True)
class WarmStartConfig:
    """
    Settings of the warm start.

    Args:
        task ([`TaskConfig`], *optional*):
            The task. Its `world` also decides the initial weights and the problems to imitate.
        size ([`ModelSize`], *optional*):
            Size of the model.
        batch_size (`int`, *optional*, defaults to `32`):
            Problems per step, new ones each time.
        learning_rate (`float`, *optional*, defaults to `2e-3`):
            Peak learning rate of AdamW.
        warmup_steps (`int`, *optional*, defaults to `30`):
            Steps of linear warm-up.
        cooldown_steps (`int`, *optional*, defaults to `100`):
            Steps of linear decay, to 5 % of the peak, that begin once the target is reached.
        max_steps (`int`, *optional*, defaults to `2000`):
            Steps within which the target must be reached; beyond them the warm start fails.
        target (`float`, *optional*, defaults to `0.95`):
            Share of lines, with pictures not trained on, that the model must write like the solution, decisions and
            free words aside.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    size: ModelSize = field(default_factory=ModelSize)
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 30
    cooldown_steps: int = 100
    max_steps: int = 2000
    target: float = 0.95


def build_task_processor(config: TaskConfig) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor of a task with pictures, the tokenizer of one without."""
    tokenizer = build_tokenizer()
    return build_processor(tokenizer) if config.pictures else tokenizer


def warm_start(
    cache_dir: str | Path,
    config: WarmStartConfig | None = None,
    *,
    on_progress: Callable[[WarmStartProgress], None] | None = None,
) -> Path:
    """
    Train a model to imitate solutions of a task, or find the result of an earlier call.

    Args:
        cache_dir (`str` or `Path`):
            Folder of finished warm starts, one folder each.
        config ([`WarmStartConfig`], *optional*):
            Settings. With others, with other versions of the libraries or with other code, another model is trained.
        on_progress (`Callable[[WarmStartProgress], None]`, *optional*):
            Called after every step of training.

    Returns:
        `Path`: Folder with the model and its processor or tokenizer, as `from_pretrained` loads them. Raises
        `RuntimeError` if the model has not learned the task's form within `max_steps`.
    """
    config = config or WarmStartConfig()
    folder = warm_start_folder(cache_dir, config)
    if folder.exists():
        return folder
    processor = build_task_processor(config.task)
    tokenizer = getattr(processor, "tokenizer", processor)
    model = build_model(tokenizer, pictures=config.task.pictures, size=config.size, seed=config.task.world)
    train(model, processor, config, on_progress)
    save_once(folder, model, processor, config)
    return folder


def warm_start_folder(cache_dir: str | Path, config: WarmStartConfig) -> Path:
    """Folder of a warm start, finished or not."""
    return Path(cache_dir) / f"study-{fingerprint(config)}"


@lru_cache
def fingerprint(config: WarmStartConfig) -> str:
    """Fingerprint of everything that decides the result: settings, code of the task and of its base, libraries."""
    return code_fingerprint(config, [Path(__file__).parent, Path(embedded.__file__).parent])


def train(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    config: WarmStartConfig,
    on_progress: Callable[[WarmStartProgress], None] | None = None,
) -> None:
    """
    Train in place: until the model writes solutions without a mistake, decisions aside, and then while it cools down.
    """
    task = config.task
    tokenizer = getattr(processor, "tokenizer", processor)
    rng = random.Random(f"warm start {task.world}")
    # The policy should find the number likeliest that it believes to see.
    validation = _solved_batch(processor, replace(task, reading=1.0), VALIDATION_PROBLEMS, rng, split="tune")
    accuracy, is_reached = imitate(
        model,
        Schedule(config.learning_rate, config.warmup_steps, config.cooldown_steps, config.max_steps),
        draw_batch=lambda cooling: _solved_batch(processor, task, config.batch_size, rng),
        measure=lambda: line_accuracy(model, validation, tokenizer),
        is_reached=lambda accuracy: accuracy >= config.target,
        on_step=on_progress or (lambda news: None),
    )
    if not is_reached:
        raise RuntimeError(
            f"After {config.max_steps} steps the warm start of {task} writes {accuracy:.1%} of the lines as it should "
            f"(target {config.target:.1%}). Use another `world`, or raise `max_steps`."
        )


def _solved_batch(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    task: TaskConfig,
    n: int,
    rng: random.Random,
    *,
    split: Split = "train",
) -> dict[str, torch.Tensor]:
    problems = sample_problems(task, n, split=split, seed=rng.getrandbits(48))
    solutions = []
    for problem in problems:
        cells = believed_cells(task, problem, rng=rng)
        numbers = believed_numbers(task, problem, cells, rng=rng)
        solutions.append(write_solution(task, problem, cells, rng=rng, numbers=numbers))
    return encode_solutions(processor, task, problems, solutions, rng=rng)


def encode_solutions(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    task: TaskConfig,
    problems: list[Problem],
    solutions: list[str],
    *,
    rng: random.Random,
) -> dict[str, torch.Tensor]:
    """
    Encode problems with solutions, laid out as in a rollout: left-padded prompts, right-padded responses.

    Returns:
        `dict[str, torch.Tensor]`: The model's inputs, and `labels` that are -100 outside the response.
    """
    rows = [{"problem": question(task, p), "answer": p.answer} for p in problems]
    if task.pictures:
        rows = [row | {"images": [draw_cells(p.numbers, rng)]} for row, p in zip(rows, problems, strict=True)]
    tokenizer = getattr(processor, "tokenizer", processor)
    return append_solutions(encode_prompts(processor, rows), solutions, tokenizer)


@torch.no_grad()
def line_accuracy(model: PreTrainedModel, batch: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase) -> float:
    """
    Share of the lines in which the model's likeliest tokens, each given the right tokens before it, equal the
    solution from [`encode_solutions`], decisions and free words aside.
    """
    labels = batch["labels"][:, 1:]
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}, use_cache=False).logits
    free = tokenizer([f" {word}" for word in (*FILLER_WORDS, *CELLS)])["input_ids"]
    is_free = torch.isin(labels, torch.tensor([row[0] for row in free]))
    is_wrong = (logits[:, :-1].argmax(-1) != labels) & (labels != IGNORED_LABEL) & ~is_free
    newline = (labels == tokenizer("\n")["input_ids"][0]).long()
    line = newline.cumsum(1) - newline
    num_lines = int(newline.sum(1).max()) + 1
    wrong_tokens = torch.zeros(len(labels), num_lines, dtype=torch.long).scatter_add_(1, line, is_wrong.long())
    return (wrong_tokens == 0).double().mean().item()
