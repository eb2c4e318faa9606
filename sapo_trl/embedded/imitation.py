"""Supervised training on written solutions, and folders that keep its results: shared by all warm starts."""

import ast
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


IGNORED_LABEL = -100
STEPS_PER_VALIDATION = 20

Accuracy = TypeVar("Accuracy")


@dataclass(frozen=True)
class Schedule:
    """
    The end of training, and the learning rate until then.

    Args:
        learning_rate (`float`): peak learning rate of AdamW.
        warmup_steps (`int`): steps of linear warm-up.
        cooldown_steps (`int`): steps of linear decay, to 5 % of the peak, that begin once the target is reached.
        max_steps (`int`): steps within which the target must be reached.
    """

    learning_rate: float
    warmup_steps: int
    cooldown_steps: int
    max_steps: int


@dataclass(frozen=True)
class ImitationStep(Generic[Accuracy]):
    """The state after a step. `accuracy` is measured every 20 steps until the cooldown."""

    step: int
    loss: float
    accuracy: Accuracy
    cooldown_steps_left: int | None
    """`None` before the cooldown."""


def imitate(
    model: PreTrainedModel,
    schedule: Schedule,
    *,
    draw_batch: Callable[[bool], Mapping[str, torch.Tensor]],
    measure: Callable[[], Accuracy],
    is_reached: Callable[[Accuracy], bool],
    on_step: Callable[[ImitationStep[Accuracy]], None],
) -> tuple[Accuracy, bool]:
    """
    Train in place until the target is reached, and then while the learning rate cools down.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model; left in evaluation mode.
        schedule ([`Schedule`]):
            Learning rate and limits.
        draw_batch (`Callable`):
            Returns the next batch, with labels. Its argument says whether training cools down.
        measure (`Callable`):
            Returns the accuracy on problems that are not trained on.
        is_reached (`Callable`):
            Whether an accuracy is the target.
        on_step (`Callable`):
            Called after every step.

    Returns:
        `tuple[Accuracy, bool]`: The last accuracy, and whether the target was reached within `max_steps`. Training
        ends without a cooldown if it was not.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.98))
    step, cooldown_left = 0, None
    model.train()
    while cooldown_left != 0:
        if cooldown_left is None and step % STEPS_PER_VALIDATION == 0:
            accuracy = measure()
            if is_reached(accuracy):
                cooldown_left = schedule.cooldown_steps
            elif step >= schedule.max_steps:
                break
        learning_rate = schedule.learning_rate * min(1.0, (step + 1) / schedule.warmup_steps)
        if cooldown_left is not None:
            learning_rate *= 0.05 + 0.95 * cooldown_left / schedule.cooldown_steps
            cooldown_left -= 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss = model(**draw_batch(cooldown_left is not None), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        on_step(ImitationStep(step, loss.item(), accuracy, cooldown_left))
    model.eval()
    return accuracy, cooldown_left is not None


def append_solutions(
    prompts: Mapping[str, torch.Tensor], solutions: list[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """
    Encode prompts with solutions, laid out as in a rollout: left-padded prompts, right-padded responses.

    Args:
        prompts (`Mapping[str, torch.Tensor]`):
            Inputs of the model for the prompts alone, left-padded.
        solutions (`list[str]`):
            Solution of each prompt; the EOS token is added.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Returns:
        `dict[str, torch.Tensor]`: The model's inputs, and `labels` that are -100 outside the solution.
    """
    response = tokenizer(
        [solution + tokenizer.eos_token for solution in solutions],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    labels = response["input_ids"].masked_fill(response["attention_mask"] == 0, IGNORED_LABEL)
    added = {"input_ids": response["input_ids"], "attention_mask": response["attention_mask"], "labels": labels}
    if "mm_token_type_ids" in prompts:
        added["mm_token_type_ids"] = torch.zeros_like(labels)
    before = {**prompts, "labels": torch.full_like(prompts["input_ids"], IGNORED_LABEL)}
    return before | {name: torch.cat([before[name], added[name]], 1) for name in added}


def fingerprint(config: Any, code_folders: Iterable[Path]) -> str:
    """
    Fingerprint of everything that decides a result: settings (a dataclass), code, and the libraries that compute.

    Comments, docstrings, imports and layout do not count: a corrected word must not invalidate finished runs.
    """
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for folder in code_folders:
        for source in sorted(folder.glob("*.py")):
            digest.update(_statements(source.read_text(encoding="utf-8")).encode())
    for library in ("pillow", "tokenizers", "torch", "transformers"):
        digest.update(version(library).encode())
    return digest.hexdigest()[:12]


def _statements(source: str) -> str:
    """The code of a module without comments, docstrings and imports, in one layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):  # a lambda's is an expression
            continue
        # A string that stands alone documents something, wherever it is.
        kept = [
            statement
            for statement in body
            if not isinstance(statement, ast.Import | ast.ImportFrom)
            and not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        ]
        node.body = kept or [ast.Pass()]
    return ast.unparse(tree)


def save_once(
    folder: Path, model: PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase, config: Any
) -> None:
    """Save the trained model. A folder of this name is always complete, even if other processes write it too."""
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
