"""A user's script under `mypy --strict`: right settings pass, wrong ones are found before a run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="mypy is not installed: pip install 'sapo_trl[dev]'"
)

# The package alone is read. Its dependencies, torch first of all, would take minutes.
CONFIG = """
[mypy]
strict = True
no_site_packages = True
ignore_missing_imports = True

[mypy-sapo_trl.*]
follow_imports = silent
"""

RIGHT = """
import torch
from datasets import Dataset

from sapo_trl import PRESETS, SAPOConfig, SAPOTrainer, SegmentationCallback, Segments, StopOnSignal
from sapo_trl.advantages import segment_gae
from sapo_trl.rewards import accuracy_reward
from sapo_trl.segmentation import EntropySegmenter


def brevity(completions: list[str], **kwargs: object) -> list[float | None]:
    return [1.0 / (1 + len(completion)) for completion in completions]


rewards: list[float | None] = accuracy_reward(completions=["4"], answer=["4"])
names: list[str] = list(PRESETS)
config = SAPOConfig(output_dir="run", critic="ladder", segmentation="newline", loss_type="segment_clip", lam=0.9)
preset: SAPOConfig = SAPOConfig.from_preset("vc_ppo", output_dir="run")
trainer = SAPOTrainer(
    model="Qwen/Qwen2.5-0.5B",
    reward_funcs=[accuracy_reward, brevity],
    args=config,
    train_dataset=Dataset.from_list([{"prompt": "1+1?", "answer": "2"}]),
    callbacks=[SegmentationCallback("segments"), StopOnSignal()],
    segmenter=EntropySegmenter(top_percent=20.0),
)
result = trainer.train(resume_from_checkpoint=True)
trainer.save_model("run")
segments: Segments = EntropySegmenter(top_percent=20.0)(torch.rand(2, 8), torch.ones(2, 8))
"""

WRONG = """
from sapo_trl import SAPOConfig, SAPOTrainer

SAPOConfig(output_dir="run", critic="laddr")
SAPOConfig(output_dir="run", segmentation="entropie")
SAPOConfig(output_dir="run", loss_type="segment")
SAPOConfig(output_dir="run", lam="0.9")


def train(trainer: SAPOTrainer) -> None:
    trainer.train(resume_from_checkpoint=1.5)
"""


def mypy(script: str, folder: Path) -> list[str]:
    """The lines that mypy prints on a script in a folder."""
    (folder / "mypy.ini").write_text(CONFIG)
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "script.py"]
    result = subprocess.run(
        command, cwd=folder, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode < 2, result.stderr
    return result.stdout.splitlines()


def test_a_users_script_passes(tmp_path):
    assert mypy(RIGHT, tmp_path) == ["Success: no issues found in 1 source file"]


def test_wrong_settings_are_found(tmp_path):
    *found, summary = mypy(WRONG, tmp_path)
    expected = {4: "critic", 5: "segmentation", 6: "loss_type", 7: "lam", 11: "resume_from_checkpoint"}
    assert summary == f"Found {len(expected)} errors in 1 file (checked 1 source file)"
    for line, (number, name) in zip(found, expected.items(), strict=True):
        assert line.startswith(f"script.py:{number}: error: Argument") and name in line
