"""The tests that a study names before its runs. Only their results are verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import write_text


if TYPE_CHECKING:
    from .config import StudyConfig

TESTED_MEASURES = {
    "log_odds": "log-odds of right decisions",
    "reading_log_odds": "log-odds of right readings",
    "accuracy": "accuracy",
    "lost_form": "share of runs that lost their form",
}
TESTS = {
    "welch": ("log_odds", "reading_log_odds"),
    "trend": ("log_odds", "reading_log_odds"),
    "permutation": ("accuracy",),
    "fisher": ("lost_form",),
}
"""The measures that each test is made for."""
SIDES = ("two", "greater", "less")
FROZEN_NAME = "preregistered.json"


class ArmOnTask(NamedTuple):
    """An arm on a task."""

    arm: str
    task: str


@dataclass(frozen=True)
class RegisteredTest:
    """
    One test of one claim.

    Args:
        claim (`str`): the claim, in words.
        experiment (`str`): the experiment that has the runs.
        measure (`str`): a measure of a run: a key of `TESTED_MEASURES`.
        test (`str`):
            `"welch"`: Student's test of a contrast of means within worlds, with a variance for each arm and world.
            `"trend"`: the same of a slope. `"permutation"`: exact, within worlds. `"fisher"`: Fisher's exact test.
        contrast (`dict[str, float]`):
            by arm, or by `arm @ task`, the weight of its mean; of `"trend"` the numbers to be ordered by. Tests of
            accuracies and shares compare one arm (weight 1) with another (weight -1).
        side (`str`, *optional*, defaults to `"greater"`): `"greater"`, `"less"` or `"two"`.
        smallest (`float`): the smallest effect that would matter, above 0. If the effect's interval excludes it and
            everything beyond, the claim does not hold.
        source (`str`, *optional*): the paper that makes the claim.
        scale (`str`, *optional*): the scale that the claim needs, if this study cannot have it.
    """

    claim: str
    experiment: str
    measure: str
    test: str
    contrast: dict[str, float]
    smallest: float
    side: str = "greater"
    source: str = ""
    scale: str = ""

    def __post_init__(self):
        for name, known in (("measure", TESTED_MEASURES), ("test", TESTS), ("side", SIDES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}.")
        if self.measure not in TESTS[self.test]:
            raise ValueError(f"test={self.test!r} is for {' and '.join(TESTS[self.test])}, not for {self.measure!r}.")
        if not isinstance(self.contrast, Mapping) or len(self.contrast) < 2:
            raise ValueError(f"contrast={self.contrast!r} must name at least two arms with their weights.")
        for number in (*self.contrast.values(), self.smallest):
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(f"{number!r} must be a finite number.")
        if self.smallest <= 0:
            raise ValueError(f"smallest={self.smallest} must be above 0: it is the size of an effect.")
        if self.test in ("permutation", "fisher") and sorted(self.contrast.values()) != [-1, 1]:
            raise ValueError(
                f"contrast={dict(self.contrast)}: {self.test!r} compares two arms, with weights 1 and -1."
            )
        if self.test == "welch" and abs(sum(self.contrast.values())) > 1e-9:
            raise ValueError(f"contrast={dict(self.contrast)}: the weights must add up to 0.")
        if self.test == "trend" and len(set(self.contrast.values())) < 2:
            raise ValueError(f"contrast={dict(self.contrast)}: a trend needs different numbers.")

    @staticmethod
    def cell(name: str, tasks: Sequence[str]) -> ArmOnTask:
        """The cell that a name in `contrast` stands for. A name without a task means the experiment's first task."""
        arm, _, task = (part.strip() for part in name.partition("@"))
        return ArmOnTask(arm, task or tasks[0])


@dataclass(frozen=True)
class Preregistered:
    """
    The confirmatory family of a study.

    Args:
        level (`float`, *optional*, defaults to `0.05`): of the whole family; Holm's method divides it.
        tests (`dict[str, RegisteredTest]`, *optional*): by name.
    """

    level: float = 0.05
    tests: dict[str, RegisteredTest] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.level, float) or not 0 < self.level < 1:
            raise ValueError(f"level={self.level!r} must lie in (0, 1).")
        built = {}
        for name, test in self.tests.items():
            try:
                built[name] = test if isinstance(test, RegisteredTest) else RegisteredTest(**test)
            except (TypeError, ValueError) as error:
                raise ValueError(f"tests.{name}: {error}") from error
        object.__setattr__(self, "tests", built)


def registered(study: StudyConfig) -> dict[str, Any]:
    """
    The tests as a study states them: with the runs that they will use, so that adding runs is a change, too.
    """
    tests = {}
    for name, test in study.preregistered.tests.items():
        experiment = study.experiments[test.experiment]
        tests[name] = asdict(test) | {"seeds": experiment.seeds, "worlds": experiment.worlds}
    return {"level": study.preregistered.level, "tests": tests}


def freeze(study: StudyConfig, output_dir: str | Path) -> None:
    """Write the tests into a study's folder before its first run. A file that is there stays as it is."""
    path = Path(output_dir) / FROZEN_NAME
    if not path.exists():
        write_text(path, json.dumps(registered(study), indent=2) + "\n")


def changed_tests(study: StudyConfig, output_dir: str | Path) -> list[str]:
    """
    Names of the tests that the study's folder does not have in this form: they were named after the first run. All of
    them, if the folder names none or the family has another size or level.
    """
    path, now = Path(output_dir) / FROZEN_NAME, registered(study)
    try:
        frozen = json.loads(path.read_bytes())
        then, same_family = frozen["tests"], frozen["level"] == now["level"]
    except (OSError, ValueError, KeyError, TypeError):
        return list(now["tests"])
    now_tests = json.loads(json.dumps(now["tests"]))
    # A test that was dropped after the runs makes the others' correction smaller.
    if not same_family or then.keys() - now_tests.keys():
        return list(now_tests)
    return [name for name, test in now_tests.items() if then.get(name) != test]
