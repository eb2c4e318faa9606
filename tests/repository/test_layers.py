"""Which parts of the package may import which: data flows one way, and tools are imported by nothing above them."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[2] / "sapo_trl"

MATHEMATICS = {
    "segments",
    "segmentation",
    "advantages",
    "token_rewards",
    "losses",
    "role_aware",
    "token_mask",
    "visual_dependency",
    "image_corruption",
    "metrics",
    "sampler_correction",
}
TOOLS = {"evaluation", "study", "planner", "viewer", "analysis", "recipes", "embedded", "cli"}
DATA_AND_REWARDS = {"data", "rewards"}
LEAVES = {
    "names",
    "metric_names",
    "settings",
    "lazy",
    "statistics",
    "run_folder",
    "folder_lock",
    "files",
    "json_files",
    "foreign_text",
    "http_client",
    "recordings",
}


def part_of(path: Path) -> str:
    """The top-level module or folder that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The other parts that a file imports at any place, also inside functions; not those for types alone."""
    own = ("sapo_trl", *path.relative_to(PACKAGE).parts[:-1])
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in for_types:
            continue
        module = (node.module or "").split(".") if node.module else []
        full = [*own[: len(own) - node.level + 1], *module] if node.level else module
        if full[:1] == ["sapo_trl"]:
            found |= {full[1]} if len(full) > 1 else {alias.name for alias in node.names}
    return found - {part_of(path)}


IMPORTS: dict[str, set[str]] = {}
for file in PACKAGE.rglob("*.py"):
    if file != PACKAGE / "__init__.py":
        IMPORTS.setdefault(part_of(file), set()).update(imports_of(file))


def test_the_imports_are_found():
    assert {"segments"} <= IMPORTS["losses"] and {"config", "losses", "rollouts"} <= IMPORTS["trainer"]
    assert MATHEMATICS | TOOLS | DATA_AND_REWARDS | LEAVES <= IMPORTS.keys()


@pytest.mark.parametrize("part", sorted(MATHEMATICS))
def test_mathematics_imports_mathematics_alone(part):
    assert IMPORTS[part] <= MATHEMATICS


@pytest.mark.parametrize("part", sorted(DATA_AND_REWARDS | LEAVES))
def test_data_and_rewards_know_no_trainer(part):
    assert IMPORTS[part] <= DATA_AND_REWARDS | LEAVES


@pytest.mark.parametrize("part", sorted(IMPORTS.keys() - TOOLS))
def test_no_tool_is_imported_from_above(part):
    assert not IMPORTS[part] & TOOLS


def test_the_trainer_is_imported_by_tools_alone():
    assert {part for part, imported in IMPORTS.items() if "trainer" in imported} <= TOOLS
