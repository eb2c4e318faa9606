"""The runs of a study. Each run has a folder, and the folder's name identifies all its settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
_ACCURACY = dict.fromkeys(("accuracy", "log_odds", "complete", "correct"), NUMBER)
"""Further required fields if the accuracy was measured."""


class Choice(NamedTuple):
    """Tuned settings: a learning rate, and one of the arm's further choices."""

    learning_rate: float
    settings: dict[str, Any]


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
        this reason the report names the code of its runs.
        """
        content = asdict(self)
        content["preset"] = preset_settings(self.arm.preset)
        if content["preset"].get("epsilon_high", 0.0) is None:  # it follows the lower clip; the number decides
            content["preset"]["epsilon_high"] = {"epsilon": 0.2, **content["preset"], **self.arm.settings}["epsilon"]
        content["policy"] = fingerprint(self.policy)
        for name in ("arm_name", "task_name"):  # names do not change the run
            del content[name]
        # The cell has its own rate and rank, and the chosen settings are among the arm's.
        for name in ("tuned_as", "learning_rate", "choices", "lora_rank"):
            del content["arm"][name]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.unmarked_name}-{self.fingerprint}"

    @property
    def unmarked_name(self) -> str:
        """The name without the fingerprint."""
        kind = self.split if self.measure == "accuracy" else self.measure.partition("_")[0]
        where = f"{self.task_name}-world{self.task.world}"
        return f"{kind}-{where}-{self.arm_name}-seed{self.seed}-lr{self.learning_rate:g}"

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
        _cell(study, arm, study.tuning.task, world, seed, Choice(learning_rate, settings), "tune")
        for seed in study.tuning.seeds
        for world in study.tuning.worlds or [study.tasks[study.tuning.task].world]
        for arm in arms
        for learning_rate in study.tuning.learning_rate
        for settings in study.arms[arm].choices or [{}]
    ]


def comparison_cells(study: StudyConfig, chosen: Mapping[str, Choice]) -> list[Cell]:
    """
    The runs of the comparisons, seed by seed. A study that is stopped early then has some runs of every arm.

    Args:
        study ([`StudyConfig`]): the study.
        chosen (`Mapping[str, Choice]`): the choice of each tuned arm.
    """
    cells = {}
    seeds = sorted({seed for experiment in study.experiments.values() for seed in experiment.seeds})
    for seed in seeds:
        for experiment in study.experiments.values():
            for task in experiment.tasks:
                for world in experiment.worlds or [study.tasks[task].world]:
                    for arm in experiment.arms:
                        if seed in experiment.seeds:
                            choice = _choice_of(study, arm, chosen)
                            if experiment.measure != "accuracy":
                                choice = choice._replace(learning_rate=0.0)  # the policy does not change
                            cell = _cell(study, arm, task, world, seed, choice, "test", experiment.measure)
                            cells.setdefault(cell.name, cell)  # two experiments may share a run
    return list(cells.values())


def _choice_of(study: StudyConfig, arm: str, chosen: Mapping[str, Choice]) -> Choice:
    fixed = study.arms[arm].learning_rate
    return Choice(fixed, {}) if fixed is not None else chosen[study.arms[arm].tuned_as or arm]


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
    study: StudyConfig,
    arm: str,
    task: str,
    world: int,
    seed: int,
    choice: Choice,
    split: str,
    measure: str = "accuracy",
) -> Cell:
    records, own_rank = study.records, study.arms[arm].lora_rank
    recorded = split == "test" and measure == "accuracy" and seed in records.seeds and arm in (records.arms or [arm])
    is_valued = arm in (records.valued_arms or [arm])
    records = replace(
        records, seeds=[], arms=[], valued_arms=[], continuations=records.continuations if is_valued else 0
    )
    return Cell(
        arm_name=arm,
        arm=replace(study.arms[arm], settings={**study.arms[arm].settings, **choice.settings}),
        task_name=task,
        task=replace(study.tasks[task], world=world),
        seed=seed,
        learning_rate=choice.learning_rate,
        budget=study.budget,
        settings=study.settings,
        model=study.model,
        lora_rank=study.lora_rank if own_rank is None else own_rank,
        warm_start=study.warm_start,
        split=split,
        measure=measure,
        records=records if recorded else None,
    )


def _tuned_arms(study: StudyConfig) -> list[str]:
    needed = _ordered(arm for experiment in study.experiments.values() for arm in experiment.arms)
    return [arm for arm in _ordered(study.arms[arm].tuned_as or arm for arm in needed) if study.arms[arm].is_tuned]


def _ordered(names: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(names))
