"""The size of the trainer's files, and tests that stay outside of it."""

import ast
from pathlib import Path

import pytest

import sapo_trl


TRAINER = Path(sapo_trl.__file__).parent / "trainer"
TESTS = Path(__file__).parents[1]
MAX_LINES = {"trainer.py": 560, "trl/bridge.py": 320}
MAX_TEST_LINES = 700

FILES = sorted(str(path.relative_to(TRAINER)) for path in TRAINER.rglob("*.py"))


def private_fields() -> set[str]:
    """The private attributes that the trainer's classes set on themselves, and their private methods."""
    names = set()
    for file in ("trainer.py", "trl/bridge.py", "trl/resumable.py"):
        for node in ast.walk(ast.parse((TRAINER / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    inherited = set().union(*(vars(cls) for cls in sapo_trl.SAPOTrainer.__mro__ if "sapo_trl" not in cls.__module__))
    return {name for name in names if name.startswith("_") and not name.startswith("__")} - inherited


def attributes_of_trainers(path: Path) -> set[str]:
    """Attributes that a file touches on names that end with "trainer"."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id.endswith("trainer")
    }


@pytest.mark.parametrize("file", FILES)
def test_no_file_of_the_trainer_is_long(file):
    lines = len((TRAINER / file).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES.get(file, 330)


def test_the_search_finds_something():
    assert MAX_LINES.keys() <= set(FILES)
    assert {"_update", "_record", "_continuations", "_buffered_inputs"} <= private_fields()
    assert "train" in attributes_of_trainers(TESTS / "trainer" / "test_trainer.py")


@pytest.mark.parametrize("file", FILES)
def test_nobody_keeps_an_accumulator(file):
    """A stage returns its measurements. An accumulator that outlives a method would gather several stages'."""
    for node in ast.walk(ast.parse((TRAINER / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign | ast.AnnAssign) and "MetricAccumulator" in ast.unparse(node):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assert not any(isinstance(target, ast.Attribute) for target in targets)


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_reaches_into_the_trainer(path):
    assert not attributes_of_trainers(path) & private_fields()


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_file_of_tests_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_TEST_LINES


def test_folders_of_tests_are_the_packages():
    folders = {path.parent.name for path in TESTS.glob("*/__init__.py")}
    packages = {path.parent.name for path in TRAINER.parent.glob("*/__init__.py")}
    # Two folders have no package: what several processes do, and the repository around the package.
    assert folders - packages == {"distributed", "repository", "vllm"}
    assert not packages - folders - {"segmentation"}
