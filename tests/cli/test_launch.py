"""`sapo-trl train --accelerate_config …`: two processes on CPUs, really started, and stopped with Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sapo_trl.callbacks.stop_on_signal import EXIT_CODE
from sapo_trl.embedded import build_model, build_processor


ROOT = Path(__file__).parents[2]
SETTINGS = {
    "model_name_or_path": "model",
    "output_dir": "out",
    "embedded_problems": 64,
    "per_device_train_batch_size": 2,
    "num_mini_batches": 2,
    "max_completion_length": 4,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1000,
}

pytestmark = pytest.mark.slow


@pytest.fixture
def workplace(tmp_path) -> Path:
    build_model().save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    # accelerate's own name for this, MULTI_CPU, starts one process.
    launch = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True}
    launch |= {"num_machines": 1, "machine_rank": 0, "num_processes": 2, "mixed_precision": "no"}
    (tmp_path / "two_processes.yaml").write_text(yaml.safe_dump(launch))
    (tmp_path / "one_process.yaml").write_text(yaml.safe_dump({**launch, "distributed_type": "MULTI_CPU"}))
    return tmp_path


def start(workplace: Path, launch_file: str, **settings) -> subprocess.Popen:
    command = [sys.executable, "-m", "sapo_trl.cli", "train", "--accelerate_config", launch_file]
    command += ["--config", str(ROOT / "trainer_configs" / "embedded.yaml")]
    command += [f"--{name}={value}" for name, value in {**SETTINGS, **settings}.items()]
    return subprocess.Popen(
        command,
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=(workplace / "errors").open("w"),
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C goes to the group
    )


def errors(workplace: Path) -> str:
    return (workplace / "errors").read_text()[-4000:]


def test_two_processes_train_and_save(workplace):
    run = start(workplace, "two_processes.yaml", max_steps=2, save_steps=2)
    printed, _ = run.communicate(timeout=600)
    assert run.returncode == 0, errors(workplace)
    assert printed.count("Model saved to out") == 1
    checkpoint = workplace / "out" / "checkpoint-2"
    states = [torch.load(checkpoint / f"process_state_{rank}.pt") for rank in range(2)]
    assert [state["num_processes"] for state in states] == [2, 2]
    assert (workplace / "out" / "critic").is_dir()


def test_ctrl_c_leaves_a_checkpoint_of_all_processes(workplace):
    run = start(workplace, "two_processes.yaml", max_steps=1000)
    for line in run.stdout:
        if line.startswith("step 3/"):
            os.killpg(run.pid, signal.SIGINT)
            break
    printed, _ = run.communicate(timeout=600)
    assert run.returncode == EXIT_CODE, errors(workplace)
    assert "`--resume_from_checkpoint True`" in printed
    (checkpoint,) = (workplace / "out").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 3 <= step < 1000
    assert {f"process_state_{rank}.pt" for rank in range(2)} < {path.name for path in checkpoint.iterdir()}
    resumed = start(workplace, "two_processes.yaml", max_steps=step + 1, resume_from_checkpoint=True)
    printed, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, errors(workplace)
    assert f"Resuming from out/{checkpoint.name}" in printed


@pytest.mark.parametrize(
    ("launch_file", "settings", "message"),
    [
        ("one_process.yaml", {}, "2 processes were requested, but accelerate has started 1"),
        ("two_processes.yaml", {"top_percent": 200}, "top_percent"),
    ],
)
def test_what_goes_wrong_in_a_process_is_the_exit_code(workplace, launch_file, settings, message):
    run = start(workplace, launch_file, **settings)
    run.communicate(timeout=600)
    assert run.returncode == 2 and message in errors(workplace)
    assert "Traceback" not in errors(workplace)
