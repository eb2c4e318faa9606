"""The code that can change a run's numbers, as one fingerprint."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path


PACKAGES = ("accelerate", "datasets", "numpy", "peft", "pillow", "tokenizers", "torch", "transformers", "trl")
_ROOT = Path(__file__).parents[1]
NEVER_LOADED = (
    "cli",
    "evaluation",
    "planner",
    "recipes",
    "viewer",
    "plots.py",
    "analysis/command.py",
    "analysis/figures.py",
    "analysis/questions.py",
    *(
        f"study/{name}.py"
        for name in (
            "analyses",
            "command",
            "comparisons",
            "credit_figure",
            "figures",
            "recordings",
            "report",
            "results",
            "runner",
            "statistics",
            "tuning",
            "verdicts",
        )
    ),
)
"""Files and folders of the package that a run never loads: they read results or have another purpose."""


@lru_cache
def code_fingerprint() -> str:
    """
    Fingerprint of the package's files that a run can load, and of the libraries' versions. Runs with equal
    fingerprints were made by the same code, even if other files changed between them.
    """
    digest = hashlib.sha256()
    for path in sorted(_ROOT.rglob("*.py")):
        name = path.relative_to(_ROOT).as_posix()
        if not name.startswith(NEVER_LOADED):
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    for package in PACKAGES:
        digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()[:12]
