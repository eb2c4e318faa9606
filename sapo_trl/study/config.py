"""The settings of a study: read from YAML, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..config import SAPOConfig
from ..names import nearest_name
from ..presets import PRESETS
from .preregistration import Preregistered, RegisteredTest
from .task import ModelSize, TaskConfig, WarmStartConfig


SEGMENTERS = ("none", "random_cuts", "noisy", "oracle_decisions", "line_pairs")
# Settings that the study itself decides, for all arms alike.
FIXED_SETTINGS = (
    "output_dir",
    "learning_rate",
    "seed",
    "max_steps",
    "num_mini_batches",
    "per_device_train_batch_size",
    "max_completion_length",
    "gradient_checkpointing",
    "use_cpu",
    "bf16",
    "logging_steps",
    "save_strategy",
    "report_to",
    "disable_tqdm",
)
MEASURES = ("accuracy", "gradient_variance", "credit")

Section = TypeVar("Section")


@dataclass(frozen=True)
class Arm:
    """
    One algorithm of the comparison: a preset, and its changes.

    Args:
        preset (`str`): name of a preset, see [`~sapo_trl.SAPOConfig.from_preset`].
        settings (`dict`, *optional*): settings of [`~sapo_trl.SAPOConfig`] instead of the preset's.
        segmenter (`str`, *optional*, defaults to `"none"`):
            `"none"`: the segmenter of the settings (`segmentation: newline` is the task's true steps).
            `"random_cuts"`: as many cuts as that segmenter makes, anywhere. `"noisy"`: its cuts, with a share of them
            moved. `"oracle_decisions"`: cuts right after each true decision. `"line_pairs"`: cuts after every second
            line.
        boundary_noise (`float`, *optional*, defaults to `0.0`): share of moved cuts, in [0, 1].
        tuned_as (`str`, *optional*):
            the arm whose tuned settings this arm takes: for variants of an algorithm. By default it is tuned itself.
        learning_rate (`float`, *optional*): a fixed rate, for an arm that is not tuned.
        choices (`list[dict]`, *optional*):
            further settings to tune, such as `[{epsilon: 0.003}, {epsilon: 0.03}]`. Each choice is combined with
            every learning rate of the grid.
        centred (`bool`, *optional*, defaults to `False`):
            whether the mean advantage at each position of the response is subtracted: a guard against lost form.
        samples (`int`, *optional*, defaults to `1`):
            multiple of the study's responses in each rollout: the paper gives GRPO eight times SAPO's.
        lora_rank (`int`, *optional*): rank to use instead of the study's.
    """

    preset: str
    settings: dict[str, Any] = field(default_factory=dict)
    segmenter: str = "none"
    boundary_noise: float = 0.0
    tuned_as: str | None = None
    learning_rate: float | None = None
    choices: list[dict[str, Any]] = field(default_factory=list)
    centred: bool = False
    samples: int = 1
    lora_rank: int | None = None

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} does not exist.{nearest_name(self.preset, PRESETS)}")
        for settings in (self.settings, *self.choices):
            if not isinstance(settings, Mapping):
                raise ValueError(f"choices: {settings!r} must be a mapping from settings to their values.")
            _check_settings(settings)
        if self.learning_rate is not None:
            _check_rate(self.learning_rate)
        if (self.tuned_as is not None) + (self.learning_rate is not None) + bool(self.choices) > 1:
            raise ValueError("Give only one of `tuned_as`, `learning_rate` and `choices`: they contradict each other.")
        if self.segmenter not in SEGMENTERS:
            raise ValueError(f"segmenter={self.segmenter!r} must be one of {', '.join(SEGMENTERS)}.")
        if not 0.0 <= self.boundary_noise <= 1.0:
            raise ValueError(f"boundary_noise={self.boundary_noise} must lie in [0, 1].")
        if (self.boundary_noise > 0) != (self.segmenter == "noisy"):
            raise ValueError("`boundary_noise` belongs to `segmenter: noisy`: give both or none of the two.")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1.")
        _check_lora_rank(self.lora_rank)

    @property
    def is_tuned(self) -> bool:
        return self.tuned_as is None and self.learning_rate is None


@dataclass(frozen=True)
class Experiment:
    """
    Runs of some arms on some tasks, in some worlds, with some seeds.

    Args:
        tasks (`list[str]`): names of tasks.
        arms (`list[str]`): names of arms.
        seeds (`list[int]`): seeds of the runs in each world. A seed decides the order of problems and the sampling.
        worlds (`list[int]`, *optional*):
            worlds of each task: their signs have other meanings, and the policy another warm start. They are the
            blocks of the comparison. By default the task's own world.
        question (`str`, *optional*): the experiment's question, for the report.
        measure (`str`, *optional*, defaults to `"accuracy"`):
            `"accuracy"`: accuracy and log-odds after training. `"gradient_variance"`: variance of gradients at the
            warm-started policy, which does not change while a learned critic learns. `"credit"`: the advantages of
            the same responses to twenty problems, again with the warm-started policy.
        axis (`dict[str, float]`, *optional*): a number for each arm, if arms differ by a number. Drawn as a curve.
        axis_label (`str`, *optional*): name of the number.
    """

    tasks: list[str]
    arms: list[str]
    seeds: list[int]
    worlds: list[int] = field(default_factory=list)
    question: str = ""
    measure: str = "accuracy"
    axis: dict[str, float] = field(default_factory=dict)
    axis_label: str = ""

    def __post_init__(self):
        for arm, number in self.axis.items():
            _check_name("axis", arm, self.arms)
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"axis: {arm}={number!r} must be a number.")
        if self.measure not in MEASURES:
            raise ValueError(f"measure={self.measure!r} must be one of {', '.join(MEASURES)}.")
        for name in ("tasks", "arms", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} is empty: name at least one.")
        for name in ("tasks", "arms", "seeds", "worlds"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}={values} names something twice.")


@dataclass(frozen=True)
class Budget:
    """
    The budget of every run.

    Args:
        rollouts (`int`): rollouts of a run.
        responses (`int`): responses in a rollout, over all groups.
        mini_batches (`int`): optimizer steps per rollout.
        test_problems (`int`): problems of the final evaluation.
    """

    rollouts: int = 60
    responses: int = 64
    mini_batches: int = 4
    test_problems: int = 512

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.responses % self.mini_batches:
            raise ValueError(f"responses={self.responses} must be a multiple of mini_batches={self.mini_batches}.")


@dataclass(frozen=True)
class Tuning:
    """
    The choice of settings: the same grid for every arm, on problems and seeds that no comparison uses.

    Args:
        learning_rate (`list[float]`): the grid. The critic's learning rate is in the arms' settings.
        seeds (`list[int]`): seeds of the tuning runs; none may be a seed of an experiment.
        task (`str`): the task of the tuning runs.
        worlds (`list[int]`, *optional*): worlds of the tuning runs, with every seed; by default the task's own.
    """

    learning_rate: list[float]
    seeds: list[int]
    task: str
    worlds: list[int] = field(default_factory=list)

    def __post_init__(self):
        if not self.learning_rate or not self.seeds:
            raise ValueError("learning_rate and seeds must name at least one value each.")
        for rate in self.learning_rate:
            _check_rate(rate)


@dataclass(frozen=True)
class Records:
    """
    Recordings of some runs for the analyses.

    Args:
        seeds (`list[int]`, *optional*): seeds whose runs are recorded, in every world; by default none.
        arms (`list[str]`, *optional*): arms whose runs are recorded; by default all.
        valued_arms (`list[str]`, *optional*): recorded arms whose critic is tested; by default all.
        every (`int`, *optional*, defaults to `10`): every so many rollouts, the first one included.
        responses (`int`, *optional*, defaults to `32`): responses of a recorded rollout.
        valued_responses (`int`, *optional*, defaults to `8`): responses among them on which a learned critic is
        tested.
        continuations (`int`, *optional*, defaults to `0`):
            continuations for the Monte-Carlo values to compare a learned critic with; `0` for no comparison.
    """

    seeds: list[int] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)
    valued_arms: list[str] = field(default_factory=list)
    every: int = 10
    responses: int = 32
    valued_responses: int = 8
    continuations: int = 0


@dataclass(frozen=True)
class StudyConfig:
    """
    A study.

    Args:
        name (`str`): name of the study.
        tasks (`dict[str, TaskConfig]`): by name.
        arms (`dict[str, Arm]`): by name.
        experiments (`dict[str, Experiment]`): by name.
        tuning ([`Tuning`]): the choice of settings.
        budget ([`Budget`]): budget of every run.
        records ([`Records`]): recordings for the analyses.
        settings (`dict`): settings of [`~sapo_trl.SAPOConfig`] that all arms share; an arm's own take precedence.
        model ([`~sapo_trl.study.task.ModelSize`]): size of the model.
        lora_rank (`int`): rank of the policy's adapters; `0` trains all weights.
        warm_start (`dict`): further settings of [`~sapo_trl.study.task.WarmStartConfig`].
        baseline (`str`): the arm to compare with.
        preregistered ([`Preregistered`], *optional*): the tests that the report may call verdicts.
        seconds (`dict[str, float]`, *optional*):
            CPU seconds of a run of an arm, of any `other` arm and of a `warm_start`, as measured: for the estimate
            before a study starts.
    """

    name: str
    tasks: dict[str, TaskConfig]
    arms: dict[str, Arm]
    experiments: dict[str, Experiment]
    tuning: Tuning
    budget: Budget = field(default_factory=Budget)
    records: Records = field(default_factory=Records)
    settings: dict[str, Any] = field(default_factory=dict)
    model: ModelSize = field(default_factory=ModelSize)
    lora_rank: int = 0
    warm_start: dict[str, Any] = field(default_factory=dict)
    baseline: str = "sapo"
    preregistered: Preregistered = field(default_factory=Preregistered)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        _check_settings(self.settings)
        _check_lora_rank(self.lora_rank)
        for section in ("arms", "valued_arms"):
            for name in getattr(self.records, section):
                _check_name(f"records.{section}", name, self.arms)
        for name in self.seconds:
            _check_name("seconds", name, [*self.arms, "other", "warm_start"])
        for name, test in self.preregistered.tests.items():
            self._check_test(f"preregistered.tests.{name}", test)
        for name in self.warm_start:
            _check_name("warm_start", name, {f.name for f in fields(WarmStartConfig)} - {"task", "size"})
        _check_name("baseline", self.baseline, self.arms)
        _check_name("tuning.task", self.tuning.task, self.tasks)
        for name, arm in self.arms.items():
            if arm.tuned_as is not None:
                _check_name(f"arms.{name}.tuned_as", arm.tuned_as, self.arms)
                if not self.arms[arm.tuned_as].is_tuned:
                    raise ValueError(f"arms.{name}.tuned_as={arm.tuned_as!r} is not tuned itself.")
        for name, experiment in self.experiments.items():
            for task in experiment.tasks:
                _check_name(f"experiments.{name}.tasks", task, self.tasks)
            for arm in experiment.arms:
                _check_name(f"experiments.{name}.arms", arm, self.arms)
            shared = set(experiment.seeds) & set(self.tuning.seeds)
            if shared:
                raise ValueError(
                    f"experiments.{name}.seeds and tuning.seeds share {sorted(shared)}: settings would be chosen on "
                    "runs that are compared."
                )

    def _check_test(self, where: str, test: RegisteredTest) -> None:
        _check_name(f"{where}.experiment", test.experiment, self.experiments)
        experiment = self.experiments[test.experiment]
        if experiment.measure != "accuracy":
            raise ValueError(f"{where}.experiment={test.experiment!r} measures no accuracy.")
        if test.test != "fisher" and len(experiment.seeds) < 2:
            raise ValueError(
                f"{where}: {test.experiment!r} needs two seeds or more, to see the spread within a world."
            )
        for name in test.contrast:
            cell = test.cell(name, experiment.tasks)
            _check_name(where, cell.task, experiment.tasks)
            _check_name(where, cell.arm, experiment.arms)


def load_study(path: str | Path) -> StudyConfig:
    """
    Read a study from a YAML file.

    Args:
        path (`str` or `Path`): the file.

    Returns:
        [`StudyConfig`]. Raises `ValueError` naming the entry that is wrong.
    """
    content = yaml.safe_load(Path(path).read_text())
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} must hold a mapping with name, tasks, arms, experiments and tuning.")
    content = dict(content)
    sections: dict[str, Any] = {}
    for name, kind in (("tasks", TaskConfig), ("arms", Arm), ("experiments", Experiment)):
        entries = content.pop(name, None)
        if not isinstance(entries, Mapping) or not entries:
            raise ValueError(f"{name} is missing in {str(path)!r}: a mapping from names to their settings.")
        sections[name] = {key: _build(kind, entry or {}, f"{name}.{key}") for key, entry in entries.items()}
    for name, kind in (
        ("tuning", Tuning),
        ("budget", Budget),
        ("records", Records),
        ("model", ModelSize),
        ("preregistered", Preregistered),
    ):
        if name in content:
            sections[name] = _build(kind, content.pop(name), name)
    return _build(StudyConfig, {**content, **sections}, str(path))


def _build(kind: type[Section], entry: Any, where: str) -> Section:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be a mapping, got {entry!r}.")
    for name in entry:
        _check_name(where, name, [f.name for f in fields(kind)])
    try:
        return kind(**entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _check_settings(settings: Mapping[str, Any]) -> None:
    for name in settings:
        _check_name("settings", name, [f.name for f in fields(SAPOConfig)])
        if name in FIXED_SETTINGS:
            raise ValueError(f"settings: {name!r} is decided by the study (budget, tuning, seeds) for all arms alike.")


def _check_rate(rate: Any) -> None:
    if not isinstance(rate, float) or rate <= 0:
        raise ValueError(
            f"learning_rate={rate!r} must be a positive number with a decimal point, such as 1.0e-4 (1e-4 is text to "
            "YAML)."
        )


def _check_lora_rank(rank: int | None) -> None:
    if rank is not None and rank < 0:
        raise ValueError(f"lora_rank={rank} must be at least 0.")


def _check_name(where: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"{where}: {name!r} is not known.{nearest_name(name, known)}")
