"""
The rows, as data, with the most important ones first. A new row is one line here.

The part of a name before the slash says which table shows the row (`table.py`). A row with another first part is shown
in a table of its own, with the numbers of its result.
"""

from __future__ import annotations

from dataclasses import dataclass


# The planner expects at most 35 GiB for full fine-tuning (weights, gradients and AdamW's states in bfloat16), 63 GiB
# with a separate critic, and 14 GiB with LoRA, so all rows should fit on a GPU of 80 GiB. A prompt has about 530
# tokens, 256 of them for its picture.
SIZES = {
    "3b": {
        "equal": "--micro_batch 4 --accumulation 2 --completion_length 1024 --same_length --rollouts 3",
        "spread": "--micro_batch 4 --accumulation 2 --completion_length 2048 --rollouts 3",
        "lengths": "--micro_batch 2 --accumulation 2 --rollouts 2 --lengths 512 1024 2048 4096",
        "generation": "--micro_batch 4 --accumulation 2 --completion_length 128 --steps 3",
    },
    "tiny": {
        "equal": "--micro_batch 2 --accumulation 1 --completion_length 32 --same_length --rollouts 2 --image_size 56",
        "spread": "--micro_batch 2 --accumulation 1 --completion_length 64 --rollouts 2 --image_size 56",
        "lengths": "--micro_batch 2 --accumulation 1 --rollouts 2 --lengths 16 64 --image_size 56",
        "generation": "--micro_batch 2 --accumulation 1 --completion_length 16 --steps 2 --image_size 84",
    },
}
"""Options of the rows, by size of the model."""

TINY_SECONDS = 60


@dataclass(frozen=True)
class Row:
    """
    A command with a process of its own.

    Args:
        name (`str`): name in the results, unique.
        title (`str`): name in the table.
        command (`str`): a script in `benchmarks/` and its arguments. `{size}`, the names in [`SIZES`] and
            `{folder}` are filled in. There it must write one JSON file.
        seconds (`float`): expected time at size `3b`, start of the process included. A guess: the times of finished
            rows correct it.
        against (`str`, *optional*): name of the row to compare with.
    """

    name: str
    title: str
    command: str
    seconds: float
    against: str | None = None

    @property
    def table(self) -> str:
        return self.name.split("/")[0]

    def arguments(self, size: str) -> str:
        """The command with the options of a size. `{folder}` stays."""
        return self.command.format(size=f"--size {size}", folder="{folder}", **SIZES[size])

    def expected(self, size: str) -> float:
        return TINY_SECONDS if size == "tiny" else self.seconds


def cost(lengths: str, row: str, title: str, seconds: float, against: str | None = None) -> Row:
    """A row of `update_cost.py`, with equal or with spread lengths."""
    command = f"update_cost.py --row {row} --measure all {{size}} {{{lengths}}} --result {{folder}}/result.json"
    return Row(f"{lengths}/{row}", title, command, seconds, against and f"{lengths}/{against}")


def profile(row: str, title: str, seconds: float) -> Row:
    """A row of `profile_step.py`, with spread lengths."""
    return Row(f"profile/{row}", title, f"profile_step.py --row {row} {{size}} {{spread}} --out {{folder}}", seconds)


def generation(row: str, title: str, seconds: float, against: str | None = None) -> Row:
    """A row of `memory_and_speed.py`, which also generates."""
    command = f"memory_and_speed.py --row {row} {{size}} {{generation}} --result {{folder}}/result.json"
    return Row(f"generation/{row}", title, command, seconds, against and f"generation/{against}")


ROWS = (
    Row("tests/gpu", "GPU tests", "on_gpu/run_tests.py {folder}/tests.json", 90),
    cost("equal", "grpo", "TRL GRPO", 40),
    cost("equal", "sapo_ladder", 'SAPO, `critic="ladder"`', 40, "grpo"),
    cost("spread", "grpo", "TRL GRPO", 45),
    cost("spread", "sapo_ladder", 'SAPO, `critic="ladder"`', 35, "grpo"),
    cost("equal", "sapo_separate", 'SAPO, `critic="separate"`', 60, "grpo"),
    cost("equal", "grpo_lora", "TRL GRPO, LoRA", 40),
    cost("equal", "sapo_adapter", 'SAPO, LoRA, `critic="adapter"`', 60, "grpo_lora"),
    cost("equal", "sapo_ladder_lora", 'SAPO, LoRA, `critic="ladder"`', 40, "grpo_lora"),
    profile("sapo_ladder", 'SAPO, `critic="ladder"`', 35),
    cost("equal", "sapo_none", 'SAPO, `critic="none"`', 40, "grpo"),
    cost("equal", "sapo_shared", 'SAPO, `critic="shared"`', 40, "grpo"),
    Row(
        "lengths/sapo_ladder",
        'SAPO, `critic="ladder"`',
        "length_scaling.py --row sapo_ladder {size} {lengths} --out {folder}",
        90,
    ),
    cost("spread", "sapo_separate", 'SAPO, `critic="separate"`', 50, "grpo"),
    cost("spread", "grpo_lora", "TRL GRPO, LoRA", 45),
    cost("spread", "sapo_adapter", 'SAPO, LoRA, `critic="adapter"`', 50, "grpo_lora"),
    cost("spread", "sapo_ladder_lora", 'SAPO, LoRA, `critic="ladder"`', 35, "grpo_lora"),
    profile("grpo", "TRL GRPO", 45),
    cost("spread", "sapo_none", 'SAPO, `critic="none"`', 35, "grpo"),
    cost("spread", "sapo_shared", 'SAPO, `critic="shared"`', 35, "grpo"),
    profile("sapo_adapter", 'SAPO, LoRA, `critic="adapter"`', 50),
    generation("grpo", "TRL GRPO", 50),
    generation("sapo_ladder", 'SAPO, `critic="ladder"`', 50, "grpo"),
    generation("sapo_separate", 'SAPO, `critic="separate"`', 60, "grpo"),
    Row("padding/drawn", "Padding of drawn rollouts", "padding.py --draws 50 --out {folder}", 20),
)
