"""One style of help and of errors for all commands."""

import pytest

from sapo_trl.cli import COMMANDS, main
from sapo_trl.cli.demo import main as demo
from sapo_trl.cli.run_arguments import parse_run
from sapo_trl.cli.train import TrainArguments
from sapo_trl.config import SAPOConfig
from sapo_trl.evaluation.command import main as evaluate


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--max_steps", "many"],
        ["train", "--lr_scheduler_type", "linaer"],
        ["eval", "--model", "m", "--dtype", "float"],
        ["eval", "--model", "m", "--limit", "0"],
        ["eval", "--model", "m", "--benchmarks", "gsm9k"],
        ["eval", "table"],
        ["plan", "--num_processes", "two", "--config", "embedded"],
        ["study", "run"],
        ["study", "run", "--config", "nowhere.yaml"],
        ["presets", "--verbose"],
        ["demo", "--rollouts", "0"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_in_one_style(arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith(f"sapo-trl {arguments[0]}") and ": error: " in line


def test_help_of_eval_names_the_file_of_settings(capsys):
    with pytest.raises(SystemExit):
        evaluate(["--help"])
    shown = capsys.readouterr().out
    assert "--config FILE" in shown and "usage: sapo-trl eval --config FILE [--SETTING VALUE ...]" in shown


def test_all_settings_are_listed_without_negations_which_still_work(capsys):
    with pytest.raises(SystemExit):
        parse_run(["--help_all"], TrainArguments, SAPOConfig)
    shown = capsys.readouterr().out
    assert "--conversational" in shown and "--no_" not in shown
    line = ["--no_conversational", "--use_cpu", "--bf16", "false"]
    assert parse_run(line, TrainArguments, SAPOConfig).settings[0].conversational is False


@pytest.mark.parametrize("name", ["--output_dir", "--output-dir"])
def test_underscores_and_hyphens(name, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr("sapo_trl.cli.demo_run.run_demo", lambda folder, *others: found.append(folder) or 0)
    assert demo([name, str(tmp_path)]) == 0 and found == [tmp_path]


def test_no_help_has_a_hyphen_first(capsys):
    for command in ("demo", "study run", "plan", "eval", "presets", "configs", "env", "view", "analyze"):
        assert command.split()[0] in COMMANDS
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        options = [word for word in capsys.readouterr().out.replace(",", " ").split() if word.startswith("--")]
        assert "--help" in options
        hyphens = {word for word in options if "-" in word[2:]}
        assert all(word.replace("-", "_").replace("__", "--", 1) in options for word in hyphens), command
