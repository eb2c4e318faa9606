"""What a file, a preset and single settings add up to."""

from pathlib import Path

import pytest
import yaml
from trl import ModelConfig

from sapo_trl import SAPOConfig
from sapo_trl.cli.run_arguments import RunRequest, parse_run
from sapo_trl.cli.train import TrainArguments
from sapo_trl.presets import PRESETS, preset_settings


RUN_FILES = sorted((Path(__file__).parents[2] / "trainer_configs").glob("*.yaml"))
CPU = ["--use_cpu", "--bf16", "false", "--use_vllm", "false"]


def parse(*arguments: str) -> RunRequest:
    return parse_run([*arguments], TrainArguments, SAPOConfig, ModelConfig)


def config_of(*arguments: str) -> SAPOConfig:
    return parse(*arguments).settings[1]


@pytest.fixture
def newline_file(tmp_path) -> str:
    path = tmp_path / "run.yaml"
    settings = {**preset_settings("sapo_newline"), "learning_rate": 1.0e-6, "num_mini_batches": 2}
    settings |= {"critic_lam": 0.5, "per_device_train_batch_size": 32}
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path), **settings}))
    return str(path)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_replaces_the_algorithm_of_a_file_and_nothing_else(preset, newline_file):
    config = config_of("--config", newline_file, "--preset", preset, *CPU)
    expected = SAPOConfig.from_preset(preset, output_dir=config.output_dir, use_cpu=True, bf16=False)
    for name in {name for known in PRESETS.values() for name in known.settings}:
        assert getattr(config, name) == getattr(expected, name), name
    assert config.learning_rate == 1.0e-6 and config.num_mini_batches == 2


@pytest.mark.parametrize(("preset", "expected"), [("ppo", 2e-5), ("vc_ppo", 2e-5), ("sao", 5e-6)])
def test_the_critics_learning_rate_stays_unless_the_preset_has_one(preset, expected, newline_file):
    """It depends on the model: ten times larger with LoRA."""
    with Path(newline_file).open("a") as file:
        file.write("critic_learning_rate: 2.0e-5\n")
    assert config_of("--config", newline_file, "--preset", preset, *CPU).critic_learning_rate == expected


def test_a_preset_leaves_the_sizes_of_the_files_critic_out(tmp_path):
    """Which another critic would refuse."""
    path = tmp_path / "run.yaml"
    path.write_text(f"critic: ladder\ncritic_layers: 2\ncritic_reads: 3\noutput_dir: {tmp_path}\n")
    assert config_of("--config", str(path), *CPU).critic_layers == 2
    config = config_of("--config", str(path), "--preset", "grpo", *CPU)
    assert (config.critic, config.critic_layers, config.critic_reads) == ("none", None, None)


def test_a_line_names_the_settings_of_the_file_that_a_preset_changes(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "preset: vc_ppo\ncritic: ladder\nlam: 0.5\ngamma: 1\nlearning_rate: 2e-6\ncritic_learning_rate: 7e-6\n"
        f"critic_layers: 3\nbeta: 1e-3\noutput_dir: {tmp_path}\n"
    )
    arguments = ["--config", str(path), *CPU]
    assert parse(*arguments).lost_line() is None
    # `gamma` and `beta` stay as they are, `lam` is the command line's, and the learning rates are the run's.
    assert parse(*arguments, "--preset", "sapo_newline", "--lam", "0.7").lost_line() == (
        "From the file, replaced by the preset: preset: vc_ppo → sapo_newline, critic: ladder → separate, "
        "critic_layers: 3 → null"
    )
    # This preset has a critic's learning rate of its own.
    assert "critic_learning_rate: 7e-6 → 5e-06" in parse(*arguments, "--preset", "sao").lost_line()


def test_single_settings_come_before_the_preset(newline_file):
    config = config_of("--config", newline_file, "--preset", "vc_ppo", "--lam", "0.7", "--learning_rate", "5e-7", *CPU)
    assert (config.lam, config.learning_rate, config.critic_lam) == (0.7, 5e-7, 1.0)


def test_a_file_may_name_a_preset_and_change_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"preset: vc_ppo\nlam: 0.5\noutput_dir: {tmp_path}\n")
    config = config_of("--config", str(path), *CPU)
    assert (config.lam, config.segmentation, config.critic_warmup_steps) == (0.5, "token", 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1e-6"], "'--learning_rat' is no setting. Did you mean `learning_rate`?"),
        (["--preset", "vcppo"], "Did you mean `vc_ppo`?"),
        (["--config", "no_such_file.yaml"], "no file and no run file of the package has the name 'no_such_file.yaml'"),
        (["--accelerate_config", "zero9"], "zero9 is neither a file nor a valid config"),
        (["--top_percent", "200", *CPU], "top_percent"),
        (["--segmentation", "lines", *CPU], "segmentation"),
    ],
)
def test_mistakes_end_with_code_2_and_the_name(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_options_of_accelerate_launch_processes(newline_file):
    request = parse("--config", newline_file, "--preset", "ppo", "--seed", "8", "--num_processes", "8", "--lam=0.9")
    assert request.launch == ["--num_processes", "8"] and request.settings == ()
    assert request.arguments == ["--config", newline_file, "--preset", "ppo", "--seed", "8", "--lam=0.9"]
    launch = parse("--accelerate_config", "zero2", "--dry_run").launch
    assert launch[0] == "--config_file" and Path(launch[1]).name == "zero2.yaml"


def test_help_shows_this_packages_settings_and_the_most_used_of_others(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for name in ("--config", "--preset", "--dataset_name", "--top_percent", "--critic", "--learning_rate", "--dtype"):
        assert name in shown, name
    assert "--hub_always_push" not in shown
    with pytest.raises(SystemExit):
        parse("--help_all")
    assert "--hub_always_push" in capsys.readouterr().out


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_every_run_file_parses(path, monkeypatch):
    assert config_of("--config", str(path), *CPU).output_dir
