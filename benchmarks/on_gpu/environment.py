"""
The Python that runs the rows: an environment beside the machine's own packages, filled from a folder of wheels.

Nothing outside of the environment is changed. It sees the machine's packages. Only missing packages are installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "gpu-wheels"
ENVIRONMENT = ROOT / "build" / "on_gpu"
WANTED = ("sapo_trl", "math-verify", "pytest", "pytest-timeout")
CHECK_SECONDS = 180


class UnfitMachine(RuntimeError):
    """The rows cannot run here. The message says why, and names a remedy."""


def prepare(wheels: Path, environment: Path = ENVIRONMENT) -> tuple[Path, list[str]]:
    """
    Make the environment, unless it is there already.

    Args:
        wheels (`Path`): folder of wheels. Without wheels in it, this Python is used as it is.
        environment (`Path`): folder of the environment.

    Returns:
        `tuple[Path, list[str]]`: the Python for the rows, and warnings.

    Raises:
        UnfitMachine: if the wheels cannot be installed.
    """
    found = {wheel.name: wheel.stat().st_size for wheel in sorted(wheels.glob("*.whl"))}
    if not found:
        return Path(sys.executable), []
    python, stamp = environment / "bin" / "python", environment / "made_from.json"
    made_from = {"python": sys.version, "prefix": sys.prefix, "wheels": found}
    if stamp.is_file():
        made = json.loads(stamp.read_text())
        if made["made_from"] == made_from:
            return python, made["warnings"]
    shutil.rmtree(environment, ignore_errors=True)
    # Without pip: not every system's Python can install it. The machine's own pip is visible from the environment.
    venv.create(environment, system_site_packages=True, symlinks=True)
    _see_packages_of_this_python(environment)
    warnings = _install(python, wheels)
    stamp.write_text(json.dumps({"made_from": made_from, "warnings": warnings}))
    return python, warnings


def _see_packages_of_this_python(environment: Path) -> None:
    """The system's packages are not enough where this Python belongs to an environment itself."""
    folders = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    paths = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    lines = [f"import site; site.addsitedir({folder!r})" for folder in folders]
    (packages / "machine.pth").write_text("\n".join(lines) + "\n")


def _install(python: Path, wheels: Path) -> list[str]:
    """Install missing packages. Returns a warning if the machine's versions do not meet all requirements."""
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
    offline = ["--no-index", "--no-cache-dir", "--find-links", str(wheels)]
    # A folder or an index in pip's settings would be searched, too.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    clean["PIP_CONFIG_FILE"] = os.devnull
    first = subprocess.run([*pip, *offline, *WANTED], capture_output=True, text=True, env=clean)
    if first.returncode == 0:
        return []
    # A version that is slightly too old should not cost the whole time on the machine: the rows will tell.
    names = [wheel.name.split("-")[0] for wheel in sorted(wheels.glob("*.whl"))]
    second = subprocess.run([*pip, *offline, "--no-deps", *names], capture_output=True, text=True, env=clean)
    if second.returncode:
        raise UnfitMachine(f"pip cannot install the wheels in {wheels}: {_error(second)}")
    return [f"the wheels were installed without their requirements, because pip said: {_error(first)}"]


def _error(process: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no message"]
    return " ".join(errors)[:400]


def variables() -> dict[str, str]:
    """Environment variables of a row: no network, one GPU, and the package of this checkout."""
    own = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_DISABLED": "true",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    # With several GPUs, transformers would split each batch among them.
    return {"CUDA_VISIBLE_DEVICES": "0", **os.environ, **own}


def check(python: Path, needs_gpu: bool) -> dict[str, Any]:
    """
    Ask the environment for its machine and its versions.

    Args:
        python (`Path`): Python of the rows.
        needs_gpu (`bool`): whether a machine without a GPU is refused.

    Returns:
        `dict[str, Any]`: `machine`, `versions`, `on_gpu` and `warnings`, see `check.py`.

    Raises:
        UnfitMachine: if a package is missing, or if PyTorch finds no GPU and one is needed.
    """
    script = [str(python), str(Path(__file__).with_name("check.py"))]
    try:
        process = subprocess.run(script, capture_output=True, text=True, env=variables(), timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        raise UnfitMachine(f"PyTorch and the GPU did not answer within {CHECK_SECONDS} seconds.") from None
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise UnfitMachine(
            f"{python} cannot import the packages: {last}. Collect wheels with `make gpu-wheels` on a machine with "
            f"a network, and copy them to {WHEELS}."
        )
    found = json.loads(process.stdout.splitlines()[-1])
    if needs_gpu and not found["on_gpu"]:
        raise UnfitMachine(f"PyTorch finds no GPU: {found['no_gpu']}. `--size tiny` runs on a CPU.")
    return found
