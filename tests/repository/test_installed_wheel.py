"""
The wheel in an environment without the checkout: each command runs from any folder.

Here the wheel lies in an empty environment that borrows this one's libraries. `make test-wheel` installs the wheel
and all it needs into an empty environment, and runs the same tests there (`SAPO_TRL_INSTALLED`).
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from sapo_trl.presets import PRESETS
from sapo_trl.run_files import run_file_names
from tests.viewer.recorded_runs import recorded_response, write_log, write_rollout


ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a wheel is built from git's files"),
]


def environment() -> dict[str, str]:
    """This process's variables without Python's own, which may lead to the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def programs(request, tmp_path_factory) -> Path:
    """The folder of an environment's programs, with the wheel installed."""
    if named := os.environ.get("SAPO_TRL_INSTALLED"):
        return Path(named) / "bin"
    folder = tmp_path_factory.mktemp("empty") / "environment"
    venv.create(folder)
    (wheel,) = request.getfixturevalue("built").glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, env=environment(), check=True, capture_output=True, timeout=300)
    # After the installation: pip would find the checkout's package there. Of this environment only the libraries are
    # seen, because the links of editable packages are not read from a folder that is named like this.
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    Path(paths["purelib"], "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture
def run(programs, tmp_path):
    """Runs a program of the environment in an empty folder; returns its output."""

    def run(program: str, *arguments: str) -> str:
        done = subprocess.run(
            [programs / program, *arguments],
            cwd=tmp_path,
            env=environment() | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_the_package_is_the_wheels(run, programs):
    script = "import sapo_trl, sys; print(sapo_trl.__file__, sys.prefix, sep='\\n')"
    file, prefix = run("python", "-c", script).splitlines()
    assert Path(prefix) == programs.parent
    assert Path(file).is_relative_to(programs.parent)
    assert not Path(file).is_relative_to(ROOT / "sapo_trl")


def test_each_command_explains_itself(run):
    assert run("sapo-trl", "--version").startswith("sapo_trl ")
    assert "--seed" in run("sapo-trl", "demo", "--help")


def test_run_files_are_listed_and_copied(run, tmp_path):
    assert run("sapo-trl", "configs").split() == run_file_names()
    run("sapo-trl", "configs", "embedded", "--copy_to", "mine")
    copied = tmp_path / "mine" / "embedded.yaml"
    assert copied.read_text() == (ROOT / "trainer_configs" / "embedded.yaml").read_text()


def test_presets_are_listed(run):
    printed = run("sapo-trl", "presets")
    assert [name for name in PRESETS if name not in printed] == []


def test_a_run_file_is_planned_by_its_name(run):
    printed = run("sapo-trl", "plan", "--config", "geo3k_qwen2.5_vl_7b_sapo")
    assert "Qwen/Qwen2.5-VL-7B-Instruct on 8 x 80 GiB" in printed
    assert "total at the peak" in printed


def test_a_dry_run_of_a_run_file_by_its_name(run, tmp_path):
    printed = run("sapo-trl", "train", "--config", "embedded", "--dry_run", "--embedded_problems", "64", "--use_cpu")
    assert "accuracy_reward" in printed
    assert "Nothing was trained (--dry_run)." in printed
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_viewed(run, tmp_path):
    write_rollout(tmp_path / "run" / "segments", [recorded_response(["Find", " AB", " is", " 7"])])
    write_log(tmp_path / "run", [{"step": 1, "reward": 0.5, "loss": 0.1}])
    run("sapo-trl", "view", "run")
    page = (tmp_path / "run" / "view.html").read_text(encoding="utf-8")
    assert "<html" in page and " AB" in page
