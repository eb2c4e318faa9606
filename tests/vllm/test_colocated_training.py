"""TRL's colocated vLLM, in the trainer's environment: each rollout comes from the weights that are trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .servers import ENVIRONMENT, IN_SYNC, NEEDS_VLLM


ROOT = Path(__file__).parents[2]

pytestmark = NEEDS_VLLM


def differences(folder: Path, kind: str) -> list[float]:
    """Mean absolute difference of the trainer's and the sampler's log-probabilities, of each rollout of a run."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.vllm.colocated", str(folder), kind],
        env={**os.environ, **ENVIRONMENT},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    log = json.loads((folder / "log.json").read_text())
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    print(kind, [entry["sampling/sampling_logp_difference/mean"] for entry in log])
    return [entry["sampling/sampling_logp_difference/mean"] for entry in log]


@pytest.mark.parametrize("kind", ["text", "pictures"])
def test_every_rollout_comes_from_the_weights_that_are_trained(kind, tmp_path):
    assert max(differences(tmp_path, kind)) < IN_SYNC


def test_without_sync_the_difference_shows_it(tmp_path):
    first, *later = differences(tmp_path, "text, weights sent once only")
    assert first < IN_SYNC
    assert min(later) > 20 * IN_SYNC
