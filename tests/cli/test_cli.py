import json
import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig, TrlParser

import sapo_trl
from sapo_trl import SAPOConfig
from sapo_trl.cli import COMMANDS, main
from sapo_trl.cli.train import TrainArguments, load_prompts
from sapo_trl.embedded import (
    build_model,
    build_processor,
    make_problems,
)
from sapo_trl.evaluation.command import short_help as evaluation_help
from sapo_trl.presets import PRESETS, preset_settings
from sapo_trl.rewards import accuracy_reward, format_reward
from sapo_trl.rewards.lookup import find_reward
from tests.test_folder_lock import holder
from tests.testing_utils import FAMILIES


EMBEDDED_CONFIG = Path(__file__).parents[2] / "trainer_configs" / "embedded.yaml"


@pytest.fixture
def model_folder(tmp_path) -> str:
    folder = tmp_path / "model"
    build_model().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return str(folder)


def parse(*arguments: str) -> tuple[TrainArguments, SAPOConfig, ModelConfig]:
    return TrlParser((TrainArguments, SAPOConfig, ModelConfig)).parse_args_and_config(
        ["--config", str(EMBEDDED_CONFIG), *arguments]
    )


# --------------------------------------------------------------------------------------------------------------- train


def test_the_embedded_config_trains_the_embedded_model_on_its_task():
    arguments, config, model_config = parse()
    assert (arguments.dataset_name, model_config.model_name_or_path) == ("embedded", "embedded")
    assert [find_reward(name) for name in arguments.reward_funcs] == [accuracy_reward]
    assert config.max_steps == 14 * config.num_mini_batches and config.generation_batch_size == 256


def test_command_line_overrides_the_config_file():
    _, config, _ = parse("--critic", "shared", "--lam", "0.9")
    assert (config.critic, config.lam, config.gamma) == ("shared", 0.9, 1.0)


def test_train_saves_a_model_that_loads(model_folder, tmp_path, capsys):
    output_dir = tmp_path / "out"
    code = main(
        ["train", "--config", str(EMBEDDED_CONFIG), "--model_name_or_path", model_folder]
        + ["--output_dir", str(output_dir), "--embedded_problems", "8", "--max_completion_length", "4"]
        + ["--per_device_train_batch_size", "2", "--num_mini_batches", "2", "--max_steps", "2"]
        + ["--record_every", "1"]
    )
    assert code == 0
    # What `sapo-trl view` reads, and the card.
    assert (output_dir / "segments" / "segments_000000_000.parquet").is_file()
    assert (output_dir / "trainer_state.json").is_file() and "2605.01327" in (output_dir / "README.md").read_text()
    assert str(output_dir) in capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(output_dir)
    assert AutoProcessor.from_pretrained(output_dir).image_token == "<|image_pad|>"
    before = AutoModelForImageTextToText.from_pretrained(model_folder)
    assert model.config.text_config.vocab_size == before.config.text_config.vocab_size
    assert (output_dir / "critic").is_dir()


def test_train_needs_a_model(capsys):
    assert main(["train", "--use_cpu"]) == 2
    assert "--model_name_or_path is required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--embedded_problems", "3"], "`train_dataset` has 3 rows, but one rollout takes 4 prompts"),
        (["--critic", "adapter"], "`critic: adapter` lives beside the policy's adapter: set `use_peft: true`"),
        (["--resume_from_checkpoint", "no/checkpoint-9"], "resume_from_checkpoint='no/checkpoint-9' is no checkpoint"),
        # Found by TRL, with the model.
        (["--use_peft", "--lora_target_modules", "no_such_layer"], "no_such_layer"),
    ],
)
def test_settings_that_do_not_fit_data_or_model(settings, message, model_folder, tmp_path, capsys):
    command = ["train", "--config", str(EMBEDDED_CONFIG), "--model_name_or_path", model_folder, "--embedded_problems"]
    command += ["8", "--output_dir", str(tmp_path), "--per_device_train_batch_size", "2", "--num_mini_batches", "2"]
    assert main([*command, *settings]) == 2
    error = capsys.readouterr().err
    assert "sapo-trl train: error: " in error and message in error and "Traceback" not in error


def test_a_damaged_checkpoint_is_one_line(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "process_state_0.pt").write_bytes(b"PK cut off")
    command = ["train", "--model_name_or_path", "not/read", "--output_dir", str(tmp_path), "--use_cpu"]
    for wanted in ("True", str(checkpoint)):
        assert main([*command, "--resume_from_checkpoint", wanted]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"sapo-trl train: error: {str(checkpoint / 'process_state_0.pt')!r} is damaged (")


def test_a_folder_of_another_run_is_one_line(tmp_path, capsys):
    with holder(tmp_path) as process:
        assert main(["train", "--model_name_or_path", "not/read", "--output_dir", str(tmp_path), "--use_cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: output_dir={str(tmp_path)!r} is in use: process {process.pid} on" in line


def test_train_refuses_unknown_settings(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("model_name_or_path: embedded\nuse_cpu: true\ntop_precent: 20\n")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(config)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "'top_precent'" in error and "Did you mean `top_percent`?" in error


def test_dry_run_shows_what_would_be_done_and_trains_nothing(model_folder, tmp_path, capsys):
    code = main(
        ["train", "--config", str(EMBEDDED_CONFIG), "--model_name_or_path", model_folder, "--preset", "vc_ppo"]
        + ["--output_dir", str(tmp_path / "out"), "--embedded_problems", "64", "--max_completion_length", "4"]
        + ["--per_device_train_batch_size", "2", "--num_mini_batches", "3", "--max_steps", "7", "--dry_run"]
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert code == 0 and not (tmp_path / "out" / "critic").exists()
    assert "segmentation: token" in shown and "critic_warmup_steps: 50" in shown
    assert "responses of a rollout 6" in shown and "optimizer steps of a rollout 3" in shown
    assert "optimizer steps of the run 7" in shown and "prompts of the data set 64" in shown
    assert "4 tokens in 4 segments" in shown and "<|image_pad|>" in shown and "Nothing was trained" in shown


def test_data_sets_from_a_folder(tmp_path):
    make_problems(3).to_parquet(tmp_path / "train.parquet")
    arguments = TrainArguments(dataset_name=str(tmp_path), prompt_template="Box it.")
    row = load_prompts(arguments, "train")[0][0]
    assert row["prompt"][0]["content"][0] == {"type": "image"}
    assert row["prompt"][0]["content"][1]["text"].endswith(" Box it.")
    assert isinstance(row["images"][0], Image.Image)
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
        load_prompts(arguments, "test")


def test_data_sets_with_prompts_stay_as_they_are(tmp_path):
    Dataset.from_dict({"prompt": ["1 + 1?"], "answer": ["2"]}).to_json(tmp_path / "train.jsonl")
    rows, _ = load_prompts(TrainArguments(dataset_name=str(tmp_path)), "train")
    assert list(rows) == [{"prompt": "1 + 1?", "answer": "2"}]


def test_data_sets_with_other_columns_are_refused(tmp_path):
    Dataset.from_dict({"question": ["1 + 1?"], "answer": ["2"]}).to_json(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=r"No column for 'problem'.*\['answer', 'question'\].*`columns:"):
        load_prompts(TrainArguments(dataset_name=str(tmp_path)), "train")


def test_rewards_by_name_and_by_import_path(tmp_path, monkeypatch):
    assert find_reward("format_reward") is format_reward
    assert find_reward("sapo_trl.rewards.accuracy_reward") is accuracy_reward
    (tmp_path / "rewards_of_a_user.py").write_text("def short(completions, **kwargs):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    assert find_reward("rewards_of_a_user.short")(completions=["x"]) == [1.0]
    with pytest.raises(ValueError, match="reward_funcs='accuracy'"):
        find_reward("accuracy")
    with pytest.raises(ValueError, match="has no 'nothing'"):
        find_reward("sapo_trl.rewards.nothing")


OVERLONG = "trl.rewards.get_soft_overlong_punishment"


def test_rewards_have_settings():
    near = find_reward("numeric_reward", {"rel_tol": 0.1})
    assert near(completions=[r"\boxed{10.5}", r"\boxed{12}"], answer=["10", "10"]) == [1.0, 0.0]
    overlong = find_reward(OVERLONG, {"max_completion_len": 8, "soft_punish_cache": 4})
    assert overlong(completion_ids=[[0] * 4, [0] * 6, [0] * 8]) == [0.0, -0.5, -1.0]
    official = find_reward("sapo_trl.rewards.geo3k.Geo3KReward", {"penalized_length": 100})
    assert official(completions=["2"], answer=["2"], completion_ids=[[0] * 100]) == [pytest.approx(-0.31)]
    assert find_reward("sapo_trl.rewards.geo3k.Geo3KReward") == sapo_trl.rewards.geo3k_reward


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("numeric_reward", {"tolerance": 1}, r"'numeric_reward' takes no \['tolerance'\]; it takes .*'rel_tol'"),
        (OVERLONG, {}, r"needs \['max_completion_len', 'soft_punish_cache'\]"),
        (OVERLONG, {"max_length": 8}, r"takes no \['max_length'\]"),
    ],
)
def test_settings_that_a_reward_does_not_have(name, settings, message):
    with pytest.raises(ValueError, match=message):
        find_reward(name, settings)


@pytest.mark.parametrize("parameters", ["completion, answer", "prompts, answer", "answer"])
def test_a_reward_function_without_completions_is_not_taken_for_a_function_that_makes_one(
    parameters, tmp_path, monkeypatch
):
    module = f"rewards_without_completions_{len(parameters)}"
    (tmp_path / f"{module}.py").write_text(f"def f({parameters}):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError) as caught:
        find_reward(f"{module}.f")
    assert str(caught.value).endswith(
        "a reward function takes `completions`, a list, and each column as a list; this one takes "
        f"{parameters.split(', ')}."
    )


def test_settings_of_rewards_that_are_not_used():
    for wrong in ({"numeric_reward": {}}, "rel_tol", ["accuracy_reward"]):
        with pytest.raises(ValueError, match="`reward_settings` must be settings of functions in `reward_funcs`"):
            TrainArguments(reward_settings=wrong)
    given = TrainArguments(reward_funcs=["numeric_reward"], reward_settings='{"numeric_reward": {"rel_tol": 0.1}}')
    assert given.reward_settings == {"numeric_reward": {"rel_tol": 0.1}}


@pytest.mark.slow
def test_length_is_shaped_from_yaml(tokenizer, tmp_path):
    """DAPO's overlong shaping and the official code's penalty, by hand for responses that are all cut off."""
    FAMILIES["qwen2"](tokenizer).build_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_dict({"problem": ["AB?", "BC?"], "answer": ["1", "2"]}).to_json(tmp_path / "train.jsonl")
    geo3k = "sapo_trl.rewards.geo3k.Geo3KReward"
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "train.jsonl"),
        "reward_funcs": ["accuracy_reward", geo3k, OVERLONG],
        "reward_settings": {
            geo3k: {"penalized_length": 6},
            OVERLONG: {"max_completion_len": 8, "soft_punish_cache": 4},
        },
        "max_completion_length": 6,
        "per_device_train_batch_size": 2,
        "num_mini_batches": 1,
        "max_steps": 1,
        "logging_steps": 1,
        "save_steps": 1,
        "output_dir": str(tmp_path / "out"),
        **{"critic": "none", "beta": 0.0, "use_cpu": True, "bf16": False, "report_to": "none"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    (entry, *_) = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    assert entry["completions/min_length"] == 6
    assert entry["rewards/soft_overlong_punishment_reward/mean"] == (8 - 4 - 6) / 4
    # 0.001 for the token beyond int(0.9 * 6), and 0.3 from the fifth on.
    assert entry["rewards/geo3k_reward/mean"] == pytest.approx(-0.301)
    assert entry["reward"] == pytest.approx(-0.801)


# -------------------------------------------------------------------------------------------------------------- others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: sapo-trl COMMAND"),
        (["trian"], "Did you mean `train`?"),
        (["demo", "--rollouts", "0"], "must be at least 1"),
        (["presets", "vcppo"], "Did you mean `vc_ppo`?"),
        (["env", "--verbose"], "unrecognized arguments: --verbose"),
        # These import TRL first.
        *(
            pytest.param(arguments, message, marks=pytest.mark.slow)
            for arguments, message in (
                (["train", "--config", str(EMBEDDED_CONFIG), "--reward_funcs", "no_such.reward"], "No module named"),
                (
                    ["train", "--config", str(EMBEDDED_CONFIG), "--model_name_or_path", ".", "--dataset_name", "none"],
                    "sapo-trl train: error: ",
                ),
                (["eval", "--model", "nowhere", "--benchmarks", "gsm9k"], "Did you mean `gsm8k`?"),
                (["study", "run", "--config", "nowhere.yaml"], "nowhere.yaml"),
                (["analyze", "lift", "nowhere", "--output", "never"], "there is no such folder"),
                (["view", "nowhere"], "there is no such folder"),
                (
                    ["plan", "--config", "nowhere.yaml"],
                    "has the name 'nowhere.yaml'",
                ),
                (["plan", "--config", str(EMBEDDED_CONFIG), "--crtic", "shared"], "crtic"),
            )
        ),
    ],
)
def test_bad_command_lines(arguments, message):
    """Through the real entry point."""
    done = subprocess.run([sys.executable, "-m", "sapo_trl.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and not done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_interrupted_command_ends_with_130(tmp_path):
    command = [sys.executable, "-u", "-m", "sapo_trl.cli", "demo", "--output-dir", str(tmp_path / "out")]
    run = subprocess.Popen(
        command,
        env={**os.environ, "SAPO_TRL_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests may run where it is ignored
    )
    assert "warm start" in run.stdout.readline()
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 130 and "Interrupted." in errors and "Traceback" not in errors


def test_the_installed_command_is_this_one():
    (script,) = entry_points(group="console_scripts", name="sapo-trl")
    assert script.load() is main


def test_every_command_has_help(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"sapo-trl {command}" in capsys.readouterr().out
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command} " in shown for command in COMMANDS)


def test_presets_are_listed_and_shown_as_yaml(capsys):
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(preset in listed for preset in PRESETS)
    assert main(["presets", "vc_ppo"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == preset_settings("vc_ppo")


def test_env_names_the_versions(capsys):
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert f"sapo_trl version: {sapo_trl.__version__}" in shown and f"PyTorch version: {torch.__version__}" in shown


def test_the_help_of_eval_is_as_wide_as_the_terminal(monkeypatch):
    texts = {}
    for columns, longest in (("80", 80), ("200", 110), ("20", 60)):
        monkeypatch.setenv("COLUMNS", columns)
        options = evaluation_help().partition("--config FILE")[2]
        assert longest - 10 < max(map(len, options.splitlines())) <= longest
        texts[longest] = options.split()
    assert texts[80] == texts[110] == texts[60]
