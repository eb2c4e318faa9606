"""`report_to`: what wandb, trackio and TensorBoard have on disk after a run of the real command, without a network."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import yaml

from sapo_trl.embedded import build_model, build_processor


ROOT = Path(__file__).parents[2]
EMBEDDED_CONFIG = ROOT / "trainer_configs" / "embedded.yaml"
REPORTERS = ("wandb", "trackio", "tensorboard")
# One of TRL's and transformers' each, the others ours.
METRICS = ("reward", "grad_norm", "critic/loss", "segments/count", "ratio/max", "critic/learning_rate", "time/value")

pytestmark = pytest.mark.slow


@dataclass
class Reported:
    """A finished run: its folder, what the trainer logged by step, and the completions table of its last log."""

    folder: Path
    log: dict[int, dict[str, float]]
    table: pd.DataFrame


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Reported:
    folder = tmp_path_factory.mktemp("reported")
    build_model().save_pretrained(folder / "model")
    build_processor().save_pretrained(folder / "model")
    settings = yaml.safe_load(EMBEDDED_CONFIG.read_text())
    settings |= {"model_name_or_path": "model", "output_dir": "out", "embedded_problems": 8}
    settings |= {"per_device_train_batch_size": 2, "num_mini_batches": 2, "max_completion_length": 4}
    settings |= {"max_steps": 4, "logging_steps": 2, "save_strategy": "steps", "save_steps": 4}
    settings |= {"log_completions": True, "num_completions_to_print": 1}
    settings |= {"report_to": [name for name in REPORTERS if find_spec(name)] or "none"}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_DISABLED"}
    environment |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio")}
    environment |= {"TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "sapo_trl.cli", "train", "--config", "run.yaml"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((folder / "out" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    log = {entry["step"]: entry for entry in history if "loss" in entry}
    assert sorted(log) == [2, 4] and all(name in log[2] for name in METRICS)
    return Reported(folder, log, pd.read_parquet(folder / "out" / "completions" / "completions_00004.parquet"))


def as_written(table: pd.DataFrame) -> list[list]:
    """The rows of a completions table as JSON has them, `step`, `prompt` and `segments/…` only."""
    columns = ["step", "prompt", "segments/text", "segments/advantages"]
    return json.loads(table[columns].to_json(orient="values", double_precision=10))


def test_the_table_on_disk(reported):
    assert len(reported.table) == 4
    assert reported.table["prompt"][0][0]["content"].startswith("[IMAGE]Find ")
    for text, advantages in zip(reported.table["segments/text"], reported.table["segments/advantages"], strict=True):
        assert text.count("│") == len(advantages) - 1


def test_wandb_offline(reported):
    pytest.importorskip("wandb")
    (run,) = (reported.folder / "wandb").glob("offline-run-*")
    history = wandb_history(next(run.glob("*.wandb")))
    by_step = {row["train/global_step"]: row for row in history if "train/loss" in row}
    for step, expected in reported.log.items():
        for name in METRICS:
            assert by_step[step][f"train/{name}"] == pytest.approx(expected[name]), name
    logged = [row for row in history if row.get("completions/nrows") and row["train/global_step"] == 4]
    assert logged
    table = json.loads((run / "files" / logged[-1]["completions/path"]).read_text())
    frame = pd.DataFrame(table["data"], columns=table["columns"])
    assert as_written(frame) == as_written(reported.table)
    assert all(cell for cell in frame["image"])


def wandb_history(path: Path, block: int = 32_768) -> list[dict]:
    """What was logged, from a file in LevelDB's log format: wandb has no reader for it."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, history = path.read_bytes(), 7, [], []
    while at + 7 <= len(data):
        if block - at % block < 7:  # the rest of a block is empty
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(b"".join(parts))
            parts = []
            items = record.history.item
            history.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return history


def test_trackio_local(reported):
    pytest.importorskip("trackio")
    (path,) = (reported.folder / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    logged = [row for row in rows if "train/loss" in row]
    for row, expected in zip(logged, reported.log.values(), strict=True):
        for name in METRICS:
            assert row[f"train/{name}"] == pytest.approx(expected[name]), name
    table = [row["completions"] for row in rows if "completions" in row][-1]
    assert as_written(pd.DataFrame(table["_value"])) == as_written(reported.table)


def test_tensorboard(reported):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(reported.folder / "tensorboard"))
    events.Reload()
    for name in METRICS:
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert written == pytest.approx({step: expected[name] for step, expected in reported.log.items()}), name
