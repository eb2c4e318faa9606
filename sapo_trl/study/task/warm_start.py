"""The supervised warm start: from random weights to a policy that reads well and believes things about the signs."""

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ...embedded import build_processor
from .config import TaskConfig
from .drawing import draw_cells
from .model import ModelSize, build_model
from .problems import Problem, Split, question, sample_problems
from .prompts import encode_prompts
from .solutions import believed_cells, write_solution
from .tokenizer import build_tokenizer
from .vocabulary import CELLS, FILLER_WORDS


IGNORED_LABEL = -100
VALIDATION_PROBLEMS = 64
STEPS_PER_VALIDATION = 20


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
        cooldown_steps (`int`, *optional*, defaults to `150`):
            Steps of linear decay, to 5 % of the peak, that begin once the target is reached.
        max_steps (`int`, *optional*, defaults to `2000`):
            Steps within which the target must be reached; beyond them the warm start fails.
        target (`float`, *optional*, defaults to `0.95`):
            Share of lines, with pictures not trained on, in which the model must write everything as the solution has
            it, decisions and free words aside.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    size: ModelSize = field(default_factory=ModelSize)
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 30
    cooldown_steps: int = 100
    max_steps: int = 2000
    target: float = 0.95


@dataclass(frozen=True)
class WarmStartProgress:
    """What the progress callback gets after every step. `accuracy` is measured every 20 steps until the cooldown."""

    step: int
    loss: float
    accuracy: float
    cooldown_steps_left: int | None
    """`None` before the cooldown."""


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
    folder = Path(cache_dir) / f"study-{fingerprint(config)}"
    if folder.exists():
        return folder
    processor = build_task_processor(config.task)
    tokenizer = getattr(processor, "tokenizer", processor)
    model = build_model(tokenizer, pictures=config.task.pictures, size=config.size, seed=config.task.world)
    train(model, processor, config, on_progress)
    # Written elsewhere and moved at once: a folder under the final name is a finished one.
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-"))
    try:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        (unfinished / "warm_start.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # else another process has finished the same folder meanwhile
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@lru_cache
def fingerprint(config: WarmStartConfig) -> str:
    """Of everything that decides the result: settings, the code of this task and of what it builds on, libraries."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    here = Path(__file__).parent
    for folder in (here, here.parent.parent / "embedded"):
        for source in sorted(folder.glob("*.py")):
            digest.update(source.read_bytes())
    for library in ("pillow", "tokenizers", "torch", "transformers"):
        digest.update(version(library).encode())
    return digest.hexdigest()[:12]


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
    validation = _solved_batch(processor, task, VALIDATION_PROBLEMS, rng, split="tune")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98))
    step, accuracy, cooldown_left = 0, 0.0, None
    model.train()
    while cooldown_left != 0:
        if cooldown_left is None and step % STEPS_PER_VALIDATION == 0:
            accuracy = line_accuracy(model, validation, tokenizer)
            if accuracy >= config.target:
                cooldown_left = config.cooldown_steps
            elif step >= config.max_steps:
                raise RuntimeError(
                    f"After {step} steps the warm start of {task} writes {accuracy:.1%} of the lines as it should "
                    f"(target {config.target:.1%}). Use another `world`, or raise `max_steps`."
                )
        learning_rate = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps)
        if cooldown_left is not None:
            learning_rate *= 0.05 + 0.95 * cooldown_left / config.cooldown_steps
            cooldown_left -= 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        batch = _solved_batch(processor, task, config.batch_size, rng)
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if on_progress is not None:
            on_progress(WarmStartProgress(step, loss.item(), accuracy, cooldown_left))
    model.eval()


def _solved_batch(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    task: TaskConfig,
    n: int,
    rng: random.Random,
    *,
    split: Split = "train",
) -> dict[str, torch.Tensor]:
    problems = sample_problems(task, n, split=split, seed=rng.getrandbits(48))
    solutions = [
        write_solution(task, problem, believed_cells(task, problem, rng=rng), rng=rng) for problem in problems
    ]
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
    prompt = dict(encode_prompts(processor, rows))
    tokenizer = getattr(processor, "tokenizer", processor)
    response = tokenizer(
        [solution + tokenizer.eos_token for solution in solutions],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    labels = response["input_ids"].masked_fill(response["attention_mask"] == 0, IGNORED_LABEL)
    added = {"input_ids": response["input_ids"], "attention_mask": response["attention_mask"], "labels": labels}
    if "mm_token_type_ids" in prompt:
        added["mm_token_type_ids"] = torch.zeros_like(labels)
    prompt["labels"] = torch.full_like(prompt["input_ids"], IGNORED_LABEL)
    return prompt | {name: torch.cat([prompt[name], added[name]], 1) for name in added}


@torch.no_grad()
def line_accuracy(model: PreTrainedModel, batch: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase) -> float:
    """
    Share of a solution's lines in which the model's likeliest tokens, each given the right ones before it, are those
    of [`encode_solutions`], decisions and free words aside.
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
