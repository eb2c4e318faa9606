"""A plan in the terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from .advice import nearest, suggest
from .memory import ERROR_MARGIN, MemoryPlan, plan_memory
from .setup import GIB
from .shapes import model_shape


def print_plan(plan: MemoryPlan, console: Console) -> None:
    """Print the items, the total, and the changes that would make it fit."""
    setup = plan.setup
    console.print(
        f"{setup.model} on {setup.processes} x {setup.gpu_memory_gib:g} GiB, sharding {setup.sharding}; "
        f"{setup.micro_batch} x {setup.accumulation} x {setup.processes} responses per optimizer step, "
        f"{setup.mini_batches} steps per rollout; {setup.prompt_length} + {setup.completion_length} tokens"
    )
    table = Table("Memory of one GPU", "when", "GiB")
    for name, size in plan.resident.items():
        if size > 0:
            table.add_row(name, "always", _gib(size))
    for phase, items in plan.phases.items():
        for name, size in items.items():
            if size > 0:
                table.add_row(name, phase, _gib(size))
    table.add_section()
    table.add_row("total at the peak", plan.peak_phase, _gib(plan.total))
    console.print(table)
    if not math.isnan(plan.kv_cache_rows):
        console.print(
            f"vLLM's cache holds {plan.kv_cache_rows:.0f} sequences of full length per process; a rollout has "
            f"{setup.rollout_rows}, and those beyond wait."
        )
    for note in notes(plan):
        console.print(note)
    margin = ""
    if plan.verdict == "borderline":
        margin = "" if plan.fits else " It probably does not fit."
        margin += f" The estimate can be wrong by {ERROR_MARGIN:.0%}: try a first rollout before a long run."
    console.print(
        f"[bold]{plan.verdict.capitalize()}[/bold]: {_gib(plan.total)} of {setup.gpu_memory_gib:g} GiB.{margin}"
    )
    if plan.fits:
        return
    if plan.vllm_shortage > 0:
        console.print(f"vLLM lacks {_gib(plan.vllm_shortage)} GiB inside its share for the weights and one sequence.")
    suggestions = suggest(setup)
    for suggestion in suggestions:
        fitted = _gib(plan_memory(suggestion.setup).total)
        console.print(f"It would with {' and '.join(suggestion.changes)} ({fitted} GiB).")
    if suggestions:
        return
    closest = nearest(setup)
    found = plan_memory(closest.setup)
    begin = "It would with" if found.fits else "The nearest set-up, which does not fit either, has"
    console.print(f"{begin} {' and '.join(closest.changes) or 'no change'} ({_gib(found.total)} GiB).")
    if not found.fits:
        console.print("Take more or larger GPUs, or a smaller model.")


def notes(plan: MemoryPlan) -> list[str]:
    """Costs that are not memory, and estimates that are weaker than the others."""
    found, linear = [], model_shape(plan.setup.model).linear_attention
    if plan.setup.compares_images:
        found.append("Each rollout has one more forward of the policy, with corrupted images.")
    if plan.setup.compares_with_gradient:
        found.append(
            "Each micro-batch has a second forward of the policy, with gradient: its activations count twice."
        )
    if linear is not None:
        found.append(
            f"Warning: {linear.layers} layers have linear attention. Their activations are counted for transformers' "
            "PyTorch code. With the kernels of flash-linear-attention and causal-conv1d they need less."
        )
    return found


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
