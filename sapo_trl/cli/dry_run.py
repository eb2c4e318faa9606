"""`--dry_run`: shows the settings of a training, its batches and a sampled response, without training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from enum import Enum

import yaml
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..callbacks import RolloutCallback
from ..config import SAPOConfig
from ..recordings import segmented_responses
from ..trainer import SAPOTrainer
from ..trainer.checks import check_size


class _FirstRollout(RolloutCallback):
    def __init__(self):
        self.rollout = None

    def on_rollout(self, args, state, control, rollout, metrics):
        self.rollout = self.rollout or rollout


def show_dry_run(trainer: SAPOTrainer, console: Console | None = None) -> None:
    """
    Print three things: all settings that differ from the defaults, the resulting numbers of responses and steps, and
    a response to one of the prompts, sampled now and cut into its segments.

    Args:
        trainer ([`SAPOTrainer`]): a trainer that is ready to train. It is not trained.
        console ([`~rich.console.Console`], *optional*): console to print to. Defaults to the terminal.
    """
    console = console or Console()
    example = _FirstRollout()
    trainer.add_callback(example)
    with _whole_groups(trainer):
        trainer.evaluate(_some_prompts(trainer))
    trainer.remove_callback(example)
    if not trainer.is_world_process_zero():
        return
    console.print("[bold]Settings that are not the defaults[/bold]")
    console.print(yaml.safe_dump(changed_settings(trainer.args), sort_keys=True), highlight=False, markup=False)
    table = Table("[bold]Batches[/bold]", "", box=None)
    for name, value in batch_arithmetic(trainer).items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)
    try:
        check_size(trainer.train_dataset, trainer.args.generation_batch_size, trainer.args.num_generations)
    except ValueError as error:
        console.print(f"[bold red]Training would not start:[/bold red] {escape(str(error))}", highlight=False)
    rollout = example.rollout
    prompt = rollout.prompt_ids[0][rollout.prompt_mask[0].bool()]
    console.print(f"\n[bold]A prompt[/bold] ({len(prompt)} tokens)")
    console.print(trainer.tokenizer.decode(prompt), highlight=False, markup=False)
    response = segmented_responses(rollout, step=0, max_responses=1)[0]
    ids = response["segment_ids"]
    console.print(f"\n[bold]A response to it[/bold], sampled now: {len(ids)} tokens in {len(set(ids))} segments")
    text = Text()
    for token, segment, following in zip(response["tokens"], ids, [*ids[1:], None], strict=True):
        text.append(token, style="reverse" if segment % 2 else "")
        if following is not None and following != segment:
            text.append("|", style="dim")
    console.print(text)
    console.print("\nNothing was trained (--dry_run).")


def changed_settings(args: SAPOConfig) -> dict[str, object]:
    """Settings that differ from the defaults of [`SAPOConfig`], as plain values."""
    changed = {}
    for field in fields(args):
        if not field.init:
            continue
        default = field.default if field.default is not MISSING else None
        if field.default_factory is not MISSING:
            default = field.default_factory()
        value = getattr(args, field.name)
        value = value.value if isinstance(value, Enum) else value
        # Transformers replaces some defaults of `None` by empty lists or by objects of its own.
        filled_in = default is None and (value == [] or type(value).__module__ != "builtins")
        if value != default and not filled_in:
            changed[field.name] = value
    return changed


def batch_arithmetic(trainer: SAPOTrainer) -> dict[str, int | str]:
    """Numbers of responses, prompts and steps that follow from the settings."""
    args, processes = trainer.args, trainer.accelerator.num_processes
    responses = args.generation_batch_size
    steps_per_rollout = args.steps_per_generation // args.gradient_accumulation_steps
    factors = (processes, args.per_device_train_batch_size, args.gradient_accumulation_steps)
    numbers: dict[str, int | str] = {
        "responses of a rollout": responses,
        "prompts of a rollout": responses // args.num_generations,
        "optimizer steps of a rollout": steps_per_rollout * args.num_iterations,
        "responses of an optimizer step": responses // steps_per_rollout,
        "= processes x micro-batch x accumulation": " x ".join(map(str, factors)),
    }
    if isinstance(trainer.train_dataset, Dataset):
        prompts = len(trainer.train_dataset)
        numbers["prompts of the data set"] = prompts
        per_epoch = prompts * args.num_generations // responses * steps_per_rollout * args.num_iterations
        numbers["optimizer steps of an epoch"] = per_epoch
        if args.max_steps <= 0:
            numbers["optimizer steps of the run"] = round(per_epoch * args.num_train_epochs)
    if args.max_steps > 0:
        numbers["optimizer steps of the run"] = args.max_steps
    numbers["longest response (tokens)"] = str(args.max_completion_length)
    return numbers


@contextlib.contextmanager
def _whole_groups(trainer: SAPOTrainer) -> Iterator[None]:
    """Make an evaluation's batch a multiple of the responses to one prompt, because TRL compares these responses."""
    before = trainer.args.per_device_eval_batch_size
    if before * trainer.args.world_size % trainer.num_generations_eval:
        trainer.args.per_device_eval_batch_size = trainer.num_generations_eval
    try:
        yield
    finally:
        trainer.args.per_device_eval_batch_size = before


def _some_prompts(trainer: SAPOTrainer) -> Dataset:
    """The first prompts, as many as fill an evaluation's batch."""
    responses = trainer.args.per_device_eval_batch_size * trainer.args.world_size
    dataset, number = trainer.train_dataset, responses // trainer.num_generations_eval
    if isinstance(dataset, IterableDataset):
        return Dataset.from_list(list(dataset.take(number)))
    return dataset.select(range(min(number, len(dataset))))
