"""The wheel, the sdist and their metadata: what users get who have no checkout."""

import ast
import re
import shutil
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


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sapo_trl {version('sapo_trl')}\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    script = (
        "import setuptools.build_meta as backend, sys; folder = sys.argv[1];"
        "backend.build_sdist(folder); backend.build_wheel(folder)"
    )
    # setuptools writes its notes beside the project: a copy keeps the checkout clean.
    copy = folder / "checkout"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    subprocess.run([sys.executable, "-c", script, str(folder)], cwd=copy, check=True, capture_output=True, timeout=300)
    return folder


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
