r"""
The runs of the paper, and a few for smaller machines, as a table of model, data, algorithm and hardware.

`python -m docs.generate.run_configs` writes `trainer_configs/*.yaml` from it, into the folder it is called in, a
clone of the repository.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sapo_trl.presets import AXES, preset_settings


FOLDER = Path("trainer_configs")

PROMPTS, MINI_BATCHES, ROLLOUTS = 512, 4, 200
"""The paper's training: prompts per rollout, optimizer steps per rollout, rollouts."""


@dataclass(frozen=True)
class Model:
    """
    A model of the paper.

    Args:
        name (`str`): name in the files' names.
        id (`str`): id on the hub.
        notes (`tuple[str, ...]`): comments on it.
    """

    name: str
    id: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data:
    """
    Training data with its instruction and rewards.

    Args:
        name (`str`): name in the files' names.
        settings (`dict`): settings of [`~sapo_trl.cli.train.TrainArguments`] and of rewards.
        notes (`tuple[str, ...]`): comments on it.
    """

    name: str
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hardware:
    """
    GPUs and how they are used.

    Args:
        processes (`int`): GPUs.
        gpu_memory_gib (`float`): memory of each.
        accelerate (`str`): file in `trainer_configs/accelerate/`.
        sharding (`str`): the file's sharding, in the planner's words.
        settings (`dict`): settings for this hardware.
    """

    processes: int
    gpu_memory_gib: float
    accelerate: str
    sharding: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """
    One file.

    Args:
        model ([`Model`]): the model to train.
        data ([`Data`]): the training data.
        preset (`str`): algorithm, see [`~sapo_trl.presets.PRESETS`].
        hardware ([`Hardware`]): the hardware.
        micro_batch (`int`): responses in one forward on one GPU.
        suffix (`str`): end of the file's name.
        changes (`dict`): settings that differ from the preset.
        extra (`dict`): further settings.
        prompts (`int`): prompts per rollout.
        notes (`tuple[str, ...]`): comments on it.
    """

    model: Model
    data: Data
    preset: str
    hardware: Hardware
    micro_batch: int
    suffix: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    prompts: int = PROMPTS
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return "_".join(part for part in (self.data.name, self.model.name, self.preset, self.suffix) if part)

    @property
    def algorithm(self) -> dict[str, Any]:
        """The preset's settings, with the changes."""
        return {**preset_settings(self.preset), **self.changes}

    @property
    def num_generations(self) -> int:
        """Responses to a prompt."""
        return self.algorithm.get("num_generations", 1)

    @property
    def batch(self) -> dict[str, Any]:
        """
        Settings of the batch arithmetic.

        Raises:
            ValueError: if the micro-batches do not add up to an optimizer step.
        """
        responses = self.prompts * self.num_generations
        per_pass = MINI_BATCHES * self.hardware.processes * self.micro_batch
        accumulation, rest = divmod(responses, per_pass)
        if rest:
            raise ValueError(f"{self.name}: {responses} responses are no multiple of {per_pass}.")
        return {
            "num_mini_batches": MINI_BATCHES,
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": accumulation,
            **({} if "num_generations" in self.algorithm else {"num_generations": 1}),
            "max_steps": ROLLOUTS * MINI_BATCHES,
        }


QWEN25_3B = Model("qwen2.5_vl_3b", "Qwen/Qwen2.5-VL-3B-Instruct")
QWEN25_7B = Model("qwen2.5_vl_7b", "Qwen/Qwen2.5-VL-7B-Instruct")
QWEN3_4B = Model(
    "qwen3_vl_4b_thinking",
    "Qwen/Qwen3-VL-4B-Thinking",
    ("The paper does not say how long this model's responses may be; thinking may need more than 2048.",),
)
QWEN35_4B = Model(
    "qwen3.5_4b",
    "Qwen/Qwen3.5-4B",
    (
        "Not in the paper. Three of four layers have linear attention. It is slow without the packages",
        "flash-linear-attention and causal-conv1d.",
    ),
)
_SFT_NOTES = (
    "The paper does not name its checkpoint. VinePPO and SPO, whose numbers it quotes, start from this one.",
    r"It was tuned on another answer format than \boxed{}; see docs/scaling.md before training it.",
)
DEEPSEEKMATH = Model("deepseekmath_7b", "realtreetune/deepseekmath-7b-sft-GSM8K", _SFT_NOTES)
RHO = Model("rho_1.1b", "realtreetune/rho-1b-sft-MATH", _SFT_NOTES)

# EasyR1's published limits for Geometry3K. The paper names none.
_PIXELS = {"min_pixels": 262_144, "max_pixels": 4_194_304}
GEO3K = Data(
    "geo3k",
    {
        "dataset_name": "hiyouga/geometry3k",
        "prompt_template": "think_boxed",
        **_PIXELS,
        "reward_funcs": ["accuracy_reward", "format_reward"],
        "reward_weights": [0.9, 0.1],
    },
)
GEO3K_THINKING = Data(
    "geo3k",
    {
        "dataset_name": "hiyouga/geometry3k",
        "prompt_template": "boxed",
        **_PIXELS,
        "reward_funcs": ["accuracy_reward"],
    },
    ("The model's chat template opens <think> in the prompt: a reward for writing the tag would always be 0.",),
)
GEO3K_TEMPLATE = Data(
    "geo3k",
    GEO3K_THINKING.settings,
    ("The model's chat template decides about <think> tags, so no reward asks for them.",),
)
GEO3K_STEPS = Data(
    "geo3k",
    {**GEO3K.settings, "prompt_template": "think_steps_boxed"},
    (
        "Another prompt than the other files': the paper gives none for this run, and without being asked for steps a",
        "model seldom writes 'Step 1:'. A response without steps is one segment.",
    ),
)
_PLAIN = ("Prompts are plain text, not messages: such checkpoints need not have a chat template.",)
GSM8K = Data(
    "gsm8k",
    {
        "dataset_name": "openai/gsm8k",
        "prompt_template": "boxed",
        "conversational": False,
        "reward_funcs": ["accuracy_reward"],
    },
    _PLAIN,
)
MATH = Data(
    "math",
    {
        "dataset_name": "nlile/hendrycks-MATH-benchmark",
        "prompt_template": "boxed",
        "conversational": False,
        "reward_funcs": ["accuracy_reward"],
    },
    ("12,000 train and 500 test rows: the split of PRM800K, see docs/data.md.", *_PLAIN),
)


def _colocated_vllm(share: float, **more: Any) -> dict[str, Any]:
    # A long image prompt may have more than the paper's 1024 tokens, and vLLM refuses a prompt that does not fit.
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": share,
        "vllm_max_model_length": 4096,
        **more,
    }


_HALF = {"bf16": True, "gradient_checkpointing": True}
EIGHT_ZERO2 = Hardware(8, 80, "zero2_8gpu", "zero2", {**_HALF, **_colocated_vllm(0.3)})
EIGHT_ZERO3 = Hardware(8, 80, "zero3_8gpu", "zero3", {**_HALF, **_colocated_vllm(0.3)})
ONE_80GB = Hardware(1, 80, "single_gpu", "none", {**_HALF, **_colocated_vllm(0.3)})
ONE_24GB = Hardware(1, 24, "single_gpu", "none", {**_HALF, **_colocated_vllm(0.42, vllm_enable_sleep_mode=True)})
# 15 of its 16 GB can be used; no bfloat16. vLLM's copy of the weights would not fit beside the trainer's.
T4 = Hardware(1, 15, "single_gpu", "none", {"fp16": True, "gradient_checkpointing": True})


def _lora(rank: int, dtype: str = "bfloat16") -> dict[str, Any]:
    return {
        "use_peft": True,
        "lora_r": rank,
        "lora_alpha": 2 * rank,
        # Dropout would make the ratios of the first mini-batch differ from 1.
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "dtype": dtype,
        # Ten times the rates of full fine-tuning, a rule of thumb for adapters.
        "learning_rate": 1e-5,
        "critic_learning_rate": 2e-5,
    }


_LORA_NOTES = ("Not in the paper: adapters, and learning rates ten times its own, a rule of thumb.",)

_TABLE_1 = ("sapo", "grpo", "ppo", "vc_ppo")
_ABLATIONS = ("sapo_naive_is", "sapo_newline", "sapo_step", "sapo_prob")
_OTHER_TABLES = ("sapo", "grpo", "ppo")

RUNS = (
    *(Run(QWEN25_3B, GEO3K, preset, EIGHT_ZERO2, 4) for preset in _TABLE_1),
    *(
        Run(QWEN25_7B, GEO3K_STEPS if preset == "sapo_step" else GEO3K, preset, EIGHT_ZERO3, 4)
        for preset in (*_TABLE_1, *_ABLATIONS)
    ),
    *(Run(QWEN3_4B, GEO3K_THINKING, preset, EIGHT_ZERO3, 4) for preset in _OTHER_TABLES),
    Run(QWEN35_4B, GEO3K_TEMPLATE, "sapo", EIGHT_ZERO3, 4),
    *(Run(DEEPSEEKMATH, GSM8K, preset, EIGHT_ZERO3, 4) for preset in _OTHER_TABLES),
    *(Run(RHO, MATH, preset, ONE_80GB, 4) for preset in _OTHER_TABLES),
    Run(
        QWEN25_3B,
        GEO3K,
        "sapo",
        ONE_24GB,
        2,
        "lora_24gb",
        {"critic": "adapter"},
        extra=_lora(32),
        prompts=128,
        notes=(*_LORA_NOTES, "A rollout of the paper's 512 prompts would keep 5 GiB of pixels on the GPU."),
    ),
    Run(QWEN25_7B, GEO3K, "sapo", ONE_80GB, 4, "lora_80gb", {"critic": "adapter"}, extra=_lora(64), notes=_LORA_NOTES),
    Run(
        QWEN25_3B,
        GEO3K,
        "sapo",
        T4,
        1,
        "lora_colab_t4",
        {"critic": "adapter"},
        extra={**_lora(16, "float16"), "max_completion_length": 512},
        prompts=16,
        notes=(
            *_LORA_NOTES,
            "Rollouts and responses are shorter than the paper's, so that a session sees some.",
        ),
    ),
)
"""Every file of `trainer_configs/` but `embedded.yaml`."""


def yaml_text(run: Run) -> str:
    """
    A run as a configuration file.

    Args:
        run ([`Run`]): row of [`RUNS`].

    Returns:
        `str`: YAML, for `sapo-trl train --config`.
    """
    hardware, algorithm = run.hardware, run.algorithm
    ordered = {name: algorithm[name] for names in AXES.values() for name in names if name in algorithm}
    training = {
        "learning_rate": 1e-6,
        **({"critic_learning_rate": 2e-6} if algorithm.get("critic", "separate") in ("separate", "adapter") else {}),
        "temperature": 1.0,
        "max_completion_length": 2048,
        **run.extra,
    }
    of_model = [name for name in training if name in ("dtype", "use_peft") or name.startswith("lora_")]
    adapter = {name: training.pop(name) for name in of_model}
    per_step = run.prompts * run.num_generations // MINI_BATCHES
    responses = f"{run.prompts} prompts"
    if run.num_generations > 1:
        responses += f" x {run.num_generations} responses"
    lines = [
        f"# {run.name}",
        f"# preset: {run.preset}",
        f"# accelerate: trainer_configs/accelerate/{hardware.accelerate}.yaml",
        f"# processes: {hardware.processes}",
        f"# sharding: {hardware.sharding}",
        f"# gpu_memory_gib: {hardware.gpu_memory_gib:g}",
        "#",
        "# Written from docs/generate/run_configs.py. Launching and hardware: docs/scaling.md.",
        *(f"# {note}" for note in run.notes),
        "",
        "# Model",
        *(f"# {note}" for note in run.model.notes),
        _dump({"model_name_or_path": run.model.id, **adapter}),
        "# Data and rewards",
        *(f"# {note}" for note in run.data.notes),
        _dump(run.data.settings),
        f"# Algorithm: the settings of the preset {run.preset!r}"
        + (f", but for {', '.join(f'`{name}`' for name in run.changes)}" if run.changes else ""),
        _dump(ordered),
        f"# A rollout: {responses}, in {MINI_BATCHES} optimizer steps of {per_step}; {ROLLOUTS} rollouts",
        _dump(run.batch),
        "# Training",
        _dump(training),
        "# Hardware",
        _dump(hardware.settings),
        "# Log once per rollout",
        _dump(
            {
                "output_dir": f"outputs/{run.name}",
                "logging_steps": MINI_BATCHES,
                "save_steps": 100,
                "save_total_limit": 2,
                "report_to": "none",
                "seed": 0,
            }
        ).rstrip(),
    ]
    return "\n".join(lines) + "\n"


def _dump(settings: dict[str, Any]) -> str:
    """One line a setting; only a text may take more."""
    return "".join(
        yaml.safe_dump(
            {name: value},
            allow_unicode=True,
            width=110,
            default_flow_style=None if isinstance(value, list) else False,
        )
        for name, value in settings.items()
    )


def main() -> None:
    """Write the files."""
    for run in RUNS:
        (FOLDER / f"{run.name}.yaml").write_text(yaml_text(run), encoding="utf-8")


if __name__ == "__main__":
    main()
