"""`sapo-trl train --dry_run`: a machine without accelerator, without network, without warm start, without model."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset

from sapo_trl import embedded
from sapo_trl.cli import main, train, train_command
from sapo_trl.presets import PRESETS
from tests.testing_utils import FAMILIES


ROOT = Path(__file__).parents[2]
EMBEDDED_FILE = ROOT / "trainer_configs" / "embedded.yaml"
SIZES = ["--max_completion_length", "4", "--embedded_problems", "64"]
SMALL = [*SIZES, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--num_mini_batches", "2"]


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *args, **kwargs: False)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["qwen2"](tokenizer).build_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def questions(tmp_path) -> Path:
    rows = {"question": [f"{n} + 1?" for n in range(8)], "answer": [str(n + 1) for n in range(8)]}
    Dataset.from_dict(rows).to_json(tmp_path / "train.jsonl")
    return tmp_path / "train.jsonl"


@pytest.fixture
def gpu_file(tmp_path, text_model, questions) -> Path:
    settings = {
        **{"preset": "vc_ppo", "lam": 0.9, "model_name_or_path": str(text_model), "dataset_name": str(questions)},
        **{"columns": {"problem": "question"}, "conversational": False, "output_dir": str(tmp_path / "out")},
        **{"bf16": True, "use_vllm": True, "vllm_mode": "colocate", "attn_implementation": "flash_attention_2"},
        **{"dtype": "bfloat16", "optim": "adamw_8bit", "gradient_checkpointing": True, "max_completion_length": 6},
        **{"per_device_train_batch_size": 2, "num_mini_batches": 2, "report_to": "wandb", "max_steps": 9},
        "reward_funcs": ["accuracy_reward", "format_reward"],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def flat(text: str) -> str:
    return " ".join(text.split())


def test_a_dry_run_trains_no_warm_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAPO_TRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "warm_start", lambda *args, **kwargs: pytest.fail("the warm start was trained"))
    code = main(["train", "--config", str(EMBEDDED_FILE), *SMALL, "--output_dir", str(tmp_path / "out"), "--dry_run"])
    shown = flat(capsys.readouterr().out)
    assert code == 0
    assert "No accelerator" not in shown  # the file itself asks for the CPU
    assert "untrained model's" in shown and "A response to it, sampled now: 4 tokens" in shown
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


def test_a_dry_run_takes_the_warm_start_that_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAPO_TRL_CACHE", str(tmp_path / "cache"))
    embedded.save_untrained(embedded.warm_start_folder(tmp_path / "cache"))
    code = main(["train", "--config", str(EMBEDDED_FILE), *SMALL, "--output_dir", str(tmp_path / "out"), "--dry_run"])
    shown = capsys.readouterr().out
    assert code == 0 and "untrained" not in shown and "sampled now: 4 tokens" in shown


def test_a_file_for_gpus_is_tried_on_the_cpu_and_shows_what_decides(gpu_file, capsys):
    assert (
        main(
            [
                "train",
                "--config",
                str(gpu_file),
                "--seed",
                "5",
                "--bf16",
                "false",
                "--no_gradient_checkpointing",
                "--dry_run",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    before, _, response = shown.partition("A prompt")
    assert "No accelerator here" in shown and "float32" in flat(before)
    assert "nearest to vc_ppo, with lam: 0.9" in flat(before)
    assert "reward functions accuracy_reward, format_reward" in flat(before)
    assert "prompts of the data set 8" in flat(before) and "columns prompt, answer" in flat(before)
    # Each setting once, under its source, as the user wrote it.
    preset, file, line = (
        before.index(f"Settings from the {name}") for name in ("preset vc_ppo", "file", "command line")
    )
    batches = before.index("Batches")
    assert before.count("lam: 0.9\n") == 1 and file < before.index("lam: 0.9\n", preset) < line
    wanted = dict(PRESETS["vc_ppo"].settings)
    del wanted["lam"]
    assert yaml.safe_load(before[before.index("\n", preset) : file]) == wanted
    given = yaml.safe_load(gpu_file.read_text())
    assert yaml.safe_load(before[before.index("\n", file) : line]) == {
        name: value for name, value in given.items() if name not in ("preset", "bf16", "gradient_checkpointing")
    }
    assert yaml.safe_load(before[before.index("\n", line) : batches]) == {
        **{"seed": 5, "bf16": False, "gradient_checkpointing": False}
    }
    # One reward for each function: a random model's four tokens earn none.
    rewards = flat(response[response.index("Its rewards") :])
    assert "accuracy_reward 0" in rewards and "format_reward 0" in rewards and "together 0" in rewards


@pytest.mark.parametrize("options", [["--dry_run"], ["--use_cpu", "--bf16", "false", "--use_vllm", "false"]])
def test_the_settings_of_a_file_that_a_preset_replaces_are_named(options, gpu_file, capsys):
    main(["train", "--config", str(gpu_file), "--preset", "ppo", "--model_name_or_path", "/nowhere/model", *options])
    changes = f"lam: 0.9 → {PRESETS['ppo'].settings['lam']}, preset: vc_ppo → ppo"
    assert capsys.readouterr().out.startswith(f"From the file, replaced by the preset: {changes}\n")


def test_a_model_that_cannot_be_loaded_is_one_line_after_the_settings(gpu_file, capsys):
    missing = str(gpu_file.parent / "no_model")
    assert main(["train", "--config", str(gpu_file), "--model_name_or_path", missing, "--dry_run"]) == 2
    shown = capsys.readouterr()
    assert "responses of a rollout 4" in flat(shown.out) and "Settings from the file" in shown.out
    (line,) = [line for line in shown.err.splitlines() if "error" in line]
    assert line.startswith(f"sapo-trl train: error: model_name_or_path={missing!r} cannot be loaded: ")
    assert shown.err.rstrip().endswith(line)


def test_a_hub_that_does_not_answer_is_not_asked_again(capsys):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    started = time.monotonic()
    train_command.stay_offline(environment)
    assert environment["HF_HUB_OFFLINE"] == "1" and time.monotonic() - started < 5
    assert "does not answer" in capsys.readouterr().err
    own_choice = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    train_command.stay_offline(own_choice)
    assert own_choice["HF_HUB_OFFLINE"] == "0"


@pytest.mark.slow
def test_a_gpu_file_without_network_ends_at_once(tmp_path):
    """Through the real entry point. Without the check, the libraries repeat each request for more than a minute."""
    file = ROOT / "trainer_configs" / "geo3k_qwen2.5_vl_3b_sapo.yaml"
    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment["PYTHONPATH"] = str(ROOT)  # the folder is another one
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "sapo_trl.cli", "train", "--config", str(file), "--dry_run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Batches" in done.stdout and "use_cpu" not in done.stderr
    assert "model_name_or_path='Qwen/Qwen2.5-VL-3B-Instruct' cannot be loaded: " in done.stderr
    assert "Retrying" not in done.stderr and "retry" not in done.stderr.lower()
