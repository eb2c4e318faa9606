"""
`--dry_run`: shows the algorithm, the settings, the batches, the data and a sampled response, without training.

The parts that need neither model nor data are shown first. So they are there even if one of these cannot be loaded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import yaml
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from trl import ModelConfig

from ..callbacks import RolloutCallback
from ..closest_preset import closest_preset
from ..config import SAPOConfig
from ..recordings import segmented_responses
from ..trainer import SAPOTrainer
from ..trainer.checks import check_size
from .run_arguments import RunRequest


class _FirstRollout(RolloutCallback):
    def __init__(self):
        self.rollout = None

    def on_rollout(self, args, state, control, rollout, metrics):
        self.rollout = self.rollout or rollout


def show_plan(request: RunRequest, console: Console | None = None) -> None:
    """
    Print everything that follows from the settings alone: the algorithm, the user's settings, the batches.

    Args:
        request ([`~sapo_trl.cli.run_arguments.RunRequest`]): the parsed command line.
        console ([`~rich.console.Console`], *optional*): console to print to. Defaults to the terminal.
    """
    console = console or Console()
    arguments, args, model_args = request.settings
    if request.replaced:
        settings = ", ".join(f"{name}: {str(value).lower()}" for name, value in request.replaced.items())
        console.print(
            "[bold]No accelerator here:[/bold] this dry run is on the CPU, in float32. It replaces settings:"
        )
        console.print(f"{settings}\n", highlight=False, markup=False)
    table = Table("[bold]Run[/bold]", "", box=None)
    split = arguments.dataset_train_split
    for name, value in {
        "algorithm": algorithm_name(args),
        "model": _model_name(model_args, request),
        "data": f"{arguments.dataset_name}, split {split}",
        "reward functions": ", ".join(arguments.reward_funcs),
    }.items():
        table.add_row(name, escape(value))
    console.print(table)
    for source, chosen in request.chosen.items():
        if chosen:
            console.print(f"\n[bold]Settings from the {escape(source)}[/bold]")
            text = yaml.safe_dump(chosen, sort_keys=True, width=1000).rstrip()
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    _show_numbers("Batches", batch_arithmetic(args), console)


def show_data(
    dataset: Dataset | IterableDataset, args: SAPOConfig, untrained: bool, console: Console | None = None
) -> None:
    """
    Print the size and the columns of the training data, and whether they suffice for training.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): training data.
        args ([`SAPOConfig`]): settings of the run.
        untrained (`bool`): whether an untrained model stands for the embedded one.
        console ([`~rich.console.Console`], *optional*): console to print to. Defaults to the terminal.
    """
    console = console or Console()
    numbers = {"columns": ", ".join(dataset.column_names or []), **data_arithmetic(dataset, args)}
    _show_numbers("Data", numbers, console)
    try:
        check_size(dataset, args.generation_batch_size, args.num_generations)
    except ValueError as error:
        console.print(f"[bold red]Training would not start:[/bold red] {escape(str(error))}", highlight=False)
    if untrained:
        console.print(
            "\nThere is no warm start of the embedded model yet, and a dry run trains none: the response below is an "
            "untrained model's."
        )


def show_sample(trainer: SAPOTrainer, console: Console | None = None) -> None:
    """
    Print a response to one of the prompts, sampled now and cut into its segments, and its rewards.

    Args:
        trainer ([`SAPOTrainer`]): a trainer that is ready to train. It is not trained.
        console ([`~rich.console.Console`], *optional*): console to print to. Defaults to the terminal.
    """
    console = console or Console()
    example = _FirstRollout()
    trainer.add_callback(example)
    with _one_group(trainer):
        trainer.evaluate(_some_prompts(trainer))
    trainer.remove_callback(example)
    if not trainer.is_world_process_zero():
        return
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
    rewards = dict(trainer.pending_log.first_rewards(len(rollout.rewards) * trainer.args.world_size))
    if len(rewards) != 1:
        rewards["together"] = float("nan") if response["reward"] is None else response["reward"]
    _show_numbers("Its rewards", {name: _number(reward) for name, reward in rewards.items()}, console)
    console.print("\nNothing was trained (--dry_run).")


def algorithm_name(args: SAPOConfig) -> str:
    """The preset of a configuration, or the nearest one with the settings that differ from it."""
    closest = closest_preset(args)
    if not closest.differences:
        return closest.name
    differences = ", ".join(f"{name}: {value}" for name, value in closest.differences.items())
    return f"nearest to {closest.name}, with {differences}"


def batch_arithmetic(args: SAPOConfig) -> dict[str, int | str]:
    """Numbers of responses, prompts and steps that follow from the settings alone."""
    responses = args.generation_batch_size
    steps_per_rollout = args.steps_per_generation // args.gradient_accumulation_steps
    factors = (args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps)
    numbers: dict[str, int | str] = {
        "responses of a rollout": responses,
        "prompts of a rollout": responses // args.num_generations,
        "optimizer steps of a rollout": steps_per_rollout * args.num_iterations,
        "responses of an optimizer step": responses // steps_per_rollout,
        "= processes x micro-batch x accumulation": " x ".join(map(str, factors)),
    }
    if args.max_steps > 0:
        numbers["optimizer steps of the run"] = args.max_steps
    numbers["longest response (tokens)"] = str(args.max_completion_length)
    return numbers


def data_arithmetic(dataset: Dataset | IterableDataset, args: SAPOConfig) -> dict[str, int | str]:
    """Numbers that follow from the size of the training data; none for a stream."""
    if not isinstance(dataset, Dataset):
        return {}
    steps_per_rollout = args.steps_per_generation // args.gradient_accumulation_steps * args.num_iterations
    per_epoch = len(dataset) * args.num_generations // args.generation_batch_size * steps_per_rollout
    numbers: dict[str, int | str] = {
        "prompts of the data set": len(dataset),
        "optimizer steps of an epoch": per_epoch,
    }
    if args.max_steps <= 0:
        numbers["optimizer steps of the run"] = round(per_epoch * args.num_train_epochs)
    return numbers


def _model_name(model_args: ModelConfig, request: RunRequest) -> str:
    dtype = "float32" if request.replaced else str(model_args.dtype)
    adapter = f", LoRA of rank {model_args.lora_r}" if model_args.use_peft else ""
    return f"{model_args.model_name_or_path}, {dtype}{adapter}"


def _show_numbers(title: str, numbers: dict[str, Any], console: Console) -> None:
    table = Table(f"[bold]{title}[/bold]", "", box=None)
    for name, value in numbers.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else escape(str(value)))
    console.print()
    console.print(table)


def _number(reward: float) -> str:
    return "none" if math.isnan(reward) else f"{reward:g}"


@contextlib.contextmanager
def _one_group(trainer: SAPOTrainer) -> Iterator[None]:
    """Let the evaluation's batch be the responses to as few prompts as possible, whole groups of them."""
    before, group = trainer.args.per_device_eval_batch_size, trainer.num_generations_eval
    trainer.args.per_device_eval_batch_size = group // math.gcd(group, trainer.args.world_size)
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
