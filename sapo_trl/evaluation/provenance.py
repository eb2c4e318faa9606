"""Provenance of a run: weights, versions, commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash


_PACKAGES = ("sapo_trl", "torch", "transformers", "vllm", "peft", "datasets", "mpmath")
_PIECES, _PIECE = 64, 1 << 16


def environment() -> dict[str, Any]:
    """Versions of all packages that decide results, and this package's commit if it lies in a repository."""
    result = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
    )
    return {
        "commit": result.stdout.strip() or None,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: _version(name) for name in _PACKAGES},
    }


def weights_fingerprint(model: str, revision: str | None = None, config: str = "config.json") -> str | None:
    """
    A fingerprint that distinguishes a model's weights from other weights under the same name.

    Args:
        model (`str`): folder or hub id of a model or an adapter.
        revision (`str`, *optional*): revision of a hub id.
        config (`str`, *optional*, defaults to `"config.json"`): name of its configuration file.

    Returns:
        `str`: For a hub id, the commit. For a folder, a hash of the weights' sizes and of pieces from each file, 4 MB
        in total per file. Reading 15 GB would take minutes, and training changes more than one tensor.
    """
    if not os.path.isdir(model):
        return extract_commit_hash(cached_file(model, config, revision=revision), None)
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(model).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for piece in range(_PIECES):
                file.seek(max(0, size - _PIECE) * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
