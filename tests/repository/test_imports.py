"""The price of an import: each name loads only the libraries that it needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sapo_trl
from sapo_trl import analysis, callbacks, data, planner, recordings, viewer
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


def after(*pieces: str) -> list[tuple[set[str], float]]:
    """
    Of each piece of code, run one after the other in one process: the heavy libraries that are loaded then, and the
    processor seconds of all pieces up to it.
    """
    measured = ["import json, sys, time"]
    for code in pieces:
        measured.append(f"try:\n    {code}\nexcept SystemExit:\n    pass")
        loaded = f"[name for name in {HEAVY} if name in sys.modules]"
        measured.append(f"print('after', json.dumps([{loaded}, time.process_time()]), file=sys.stderr)")
    command = [sys.executable, "-c", "\n".join(measured)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = [json.loads(line[6:]) for line in done.stderr.splitlines() if line.startswith("after ")]
    assert len(results) == len(pieces)
    return [(set(loaded), seconds) for loaded, seconds in results]


def test_each_name_costs_what_it_needs():
    """The package itself nothing; the mathematics torch and no more."""
    pieces = {
        "import sapo_trl; dir(sapo_trl)": set(),
        "from sapo_trl import PRESETS": set(),
        "from sapo_trl.recordings import segmented_responses": set(),
        "from sapo_trl import Segments": {"torch"},
        "import " + ", ".join(f"sapo_trl.{name}" for name in MATHEMATICS): {"torch"},
    }
    assert [loaded for loaded, _ in after(*pieces)] == list(pieces.values())


def test_help_loads_no_model_library():
    """Neither the list of commands, nor a misspelled one, nor any command's own."""
    commands = [["--help"], ["trian"], *([command, "--help"] for command in COMMANDS)]
    assert len(commands) > 5
    results = after(*(f"from sapo_trl.cli import main; main({arguments})" for arguments in commands))
    assert [loaded for loaded, _ in results] == [set()] * len(commands)
    # Processor time adds up, so that each of them alone takes no longer.
    assert results[1][1] < 0.5 and results[-1][1] < 1.5


@pytest.mark.parametrize(
    "package",
    [sapo_trl, analysis, callbacks, data, planner, recordings, viewer],
    ids=lambda package: package.__name__,
)
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
