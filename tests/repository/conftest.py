"""The wheel and the sdist, built once."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
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
