"""Prints a line of JSON: the machine, the versions, and warnings. `environment.py` runs it before the rows."""

from __future__ import annotations

import importlib.metadata
import json
import platform

import torch
import trl  # noqa: F401
from packaging.requirements import Requirement

import sapo_trl
from sapo_trl.planner.setup import GIB


PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")


def versions_outside_of_ranges() -> list[str]:
    """Installed versions that this package's requirements do not allow."""
    found = []
    for line in importlib.metadata.requires("sapo_trl") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = importlib.metadata.version(requirement.name)
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version} is outside of the tested range {requirement.specifier}")
    return found


def machine() -> tuple[str, list[str]]:
    """The GPU, or the processor, and warnings about it."""
    if not torch.cuda.is_available():
        return f"CPU {platform.machine()}, {torch.get_num_threads()} thread(s)", []
    torch.ones(8, device="cuda").sum().item()  # a driver that is too old fails here, not in each row
    free, total = torch.cuda.mem_get_info()
    warnings = []
    if free < 0.95 * total:
        warnings.append(f"other programs hold {(total - free) / GIB:.0f} of the GPU's {total / GIB:.0f} GiB")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        warnings.append("this GPU has no bfloat16 of its own; PyTorch emulates it")
    return f"{torch.cuda.get_device_name()}, {total / GIB:.0f} GiB", warnings


def no_gpu() -> str | None:
    """The reason why PyTorch finds no GPU."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:
        return f"torch {torch.__version__}: {str(error).splitlines()[0]}"
    return f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"


def main() -> None:
    # Both are loaded when they are first used. An import that fails should fail before the rows.
    assert sapo_trl.SAPOTrainer and sapo_trl.SAPOConfig
    name, warnings = machine()
    versions = {"Python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    versions["torch"] = torch.__version__
    found = {"machine": name, "on_gpu": torch.cuda.is_available(), "no_gpu": no_gpu(), "versions": versions}
    print(json.dumps(found | {"warnings": warnings + versions_outside_of_ranges()}))


if __name__ == "__main__":
    main()
