"""The runs of a study. Each run has a folder, and the folder's name identifies all its settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..json_files import NUMBER, check_shape
from ..presets import preset_settings
from .config import Arm, Budget, Records, StudyConfig
from .task import ModelSize, TaskConfig, WarmStartConfig
from .task.warm_start import fingerprint


RESULT_NAME = "result.json"
CELL_NAME = "cell.json"
_COSTS = ("seconds", "cpu_seconds", "completions", "optimizer_steps", "rollout_tokens", "sampled_tokens")
_RESULT = {"measure": str, "environment": dict, **dict.fromkeys(_COSTS, NUMBER)}
"""Required fields of every `result.json`."""
_ACCURACY = dict.fromkeys(("accuracy", "greedy_accuracy"), NUMBER)
"""Further required fields if the accuracy was measured."""


@dataclass(frozen=True)
class Cell:
    """
    One run: an arm on a task with a seed and a learning rate.

    Args:
        arm_name (`str`): name of the arm.
        arm ([`Arm`]): the arm.
        task_name (`str`): name of the task.
        task ([`TaskConfig`]): the task.
        seed (`int`): seed of the run.
        learning_rate (`float`): learning rate of the policy.
        budget ([`Budget`]): rollouts, responses and steps of the run.
        settings (`dict`): settings that all arms share.
        model ([`ModelSize`]): size of the model.
        lora_rank (`int`): rank of the policy's adapters; `0` trains all weights.
        warm_start (`dict`): further settings of the warm start.
        split (`str`): the split of the final evaluation: `"tune"` or `"test"`.
        measure (`str`): the measurement, see [`~sapo_trl.study.config.Experiment`].
        records ([`Records`], *optional*): recordings for the analyses; `None` for none.
    """

    arm_name: str
    arm: Arm
    task_name: str
    task: TaskConfig
    seed: int
    learning_rate: float
    budget: Budget
    settings: dict[str, Any]
    model: ModelSize
    lora_rank: int
    warm_start: dict[str, Any]
    split: str
    measure: str = "accuracy"
    records: Records | None = None

    @property
    def policy(self) -> WarmStartConfig:
        """The initial policy."""
        return WarmStartConfig(task=self.task, size=self.model, **self.warm_start)

    @property
    def fingerprint(self) -> str:
        """
        Fingerprint of the run's settings, including its preset's settings, and of its initial policy. If settings
        change, the study repeats the affected runs. Other code of this package is not part of the fingerprint. For
        this reason the report names the commits of its runs.
        """
        content = asdict(self)
        content["preset"] = preset_settings(self.arm.preset)
        if content["preset"].get("epsilon_high", 0.0) is None:  # it follows the lower clip; the number decides
            content["preset"]["epsilon_high"] = {"epsilon": 0.2, **content["preset"], **self.arm.settings}["epsilon"]
        content["policy"] = fingerprint(self.policy)
        for name in ("arm_name", "task_name"):  # names do not change the run
            del content[name]
        for name in ("tuned_as", "lora_rank"):  # `tuned_as` does not change the run, and the cell has its own rank
            del content["arm"][name]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.unmarked_name}-{self.fingerprint}"

    @property
    def unmarked_name(self) -> str:
        """The name without the fingerprint."""
        kind = self.split if self.measure == "accuracy" else "gradients"
        return f"{kind}-{self.task_name}-{self.arm_name}-seed{self.seed}-lr{self.learning_rate:g}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Cell:
        content = json.loads(text)
        kinds = {"arm": Arm, "task": TaskConfig, "budget": Budget, "model": ModelSize, "records": Records}
        for name, kind in kinds.items():
            if content[name] is not None:
                content[name] = kind(**content[name])
        return cls(**content)


def tuning_cells(study: StudyConfig) -> list[Cell]:
    """The tuning runs."""
    arms = _tuned_arms(study)
    return [
        _cell(study, arm, study.tuning.task, seed, learning_rate, "tune")
        for seed in study.tuning.seeds
        for arm in arms
        for learning_rate in study.tuning.learning_rate
    ]


def comparison_cells(study: StudyConfig, learning_rates: dict[str, float]) -> list[Cell]:
    """
    The runs of the comparisons, seed by seed. A study that is stopped early then has some runs of every arm.

    Args:
        study ([`StudyConfig`]): the study.
        learning_rates (`dict[str, float]`): the chosen learning rate of each tuned arm.
    """
    cells = {}
    seeds = sorted({seed for experiment in study.experiments.values() for seed in experiment.seeds})
    for seed in seeds:
        for experiment in study.experiments.values():
            for task in experiment.tasks:
                for arm in experiment.arms:
                    if seed in experiment.seeds:
                        learning_rate = learning_rates[study.arms[arm].tuned_as or arm]
                        if experiment.measure == "gradient_variance":
                            learning_rate = 0.0  # the policy does not change
                        cell = _cell(study, arm, task, seed, learning_rate, "test", experiment.measure)
                        cells.setdefault(cell.name, cell)  # two experiments may share a run
    return list(cells.values())


def result_of(folder: Path) -> dict[str, Any] | None:
    """
    The result of a finished run; `None` if the run is not finished. Raises `ValueError` for a file of another version.
    """
    path = folder / RESULT_NAME
    try:
        result = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):  # a power cut may leave a damaged file
        return None
    check_shape(result, _RESULT, str(path))
    if result["measure"] == "accuracy":
        check_shape(result, _ACCURACY, str(path))
    return result


def _cell(
    study: StudyConfig, arm: str, task: str, seed: int, learning_rate: float, split: str, measure: str = "accuracy"
) -> Cell:
    records, own_rank = study.records, study.arms[arm].lora_rank
    recorded = split == "test" and measure == "accuracy" and seed in records.seeds and arm in (records.arms or [arm])
    return Cell(
        arm_name=arm,
        arm=study.arms[arm],
        task_name=task,
        task=study.tasks[task],
        seed=seed,
        learning_rate=learning_rate,
        budget=study.budget,
        settings=study.settings,
        model=study.model,
        lora_rank=study.lora_rank if own_rank is None else own_rank,
        warm_start=study.warm_start,
        split=split,
        measure=measure,
        records=replace(records, seeds=[], arms=[]) if recorded else None,
    )


def _tuned_arms(study: StudyConfig) -> list[str]:
    needed = _ordered(arm for experiment in study.experiments.values() for arm in experiment.arms)
    return _ordered(study.arms[arm].tuned_as or arm for arm in needed)


def _ordered(names: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(names))
