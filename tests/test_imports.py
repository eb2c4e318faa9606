"""The price of an import: each name loads only the libraries that it needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sapo_trl
from sapo_trl import analysis, data, planner, viewer
from sapo_trl.cli import COMMANDS


HEAVY = ("torch", "transformers", "datasets", "trl.trainer", "accelerate", "peft", "pandas", "matplotlib")

MATHEMATICS = (
    "segments",
    "advantages",
    "token_rewards",
    "losses",
    "role_aware",
    "metrics",
    "sampler_correction",
    "segmentation",
)


def after(code: str) -> tuple[set[str], float]:
    """The heavy libraries that some code has loaded in a process of its own, and the processor seconds of it."""
    measured = (
        f"import json, sys, time\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
        f"print(json.dumps([[name for name in {HEAVY} if name in sys.modules], time.process_time()]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", measured], capture_output=True, text=True, check=True)
    loaded, seconds = json.loads(done.stderr.splitlines()[-1])
    return set(loaded), seconds


def test_mathematics_costs_torch_and_no_more():
    loaded, _ = after("import " + ", ".join(f"sapo_trl.{name}" for name in MATHEMATICS))
    assert loaded == {"torch"}


def test_the_package_costs_nothing_until_a_name_is_used():
    assert after("import sapo_trl; dir(sapo_trl)")[0] == set()
    assert after("from sapo_trl import Segments")[0] == {"torch"}
    assert after("from sapo_trl import PRESETS")[0] == set()


@pytest.mark.parametrize("arguments", [["--help"], ["trian"], *([command, "--help"] for command in COMMANDS)])
def test_help_loads_no_model_library(arguments):
    loaded, seconds = after(f"from sapo_trl.cli import main; main({arguments})")
    assert loaded == set()
    assert seconds < (0.5 if len(arguments) == 1 else 1.5)


@pytest.mark.parametrize("package", [sapo_trl, analysis, data, planner, viewer], ids=lambda package: package.__name__)
def test_no_module_hides_a_name(package):
    modules = {path.stem for path in Path(package.__file__).parent.glob("*.py")}
    assert "__init__" in modules and not modules & set(package.__all__)
    assert set(dir(package)) == set(package.__all__)


def test_every_public_name_is_found_and_listed():
    assert set(sapo_trl.__all__) <= set(dir(sapo_trl))
    assert len(sapo_trl.__all__) == 9
    for name in sapo_trl.__all__:
        assert getattr(sapo_trl, name) is not None
    with pytest.raises(AttributeError, match="module 'sapo_trl' has no attribute 'SAPO'"):
        getattr(sapo_trl, "SAPO")  # noqa: B009
