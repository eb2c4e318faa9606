"""One style of help and of errors for all commands."""

import re

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


@pytest.mark.parametrize(
    "command",
    ["train", "eval", "eval table", "plan", "view", "analyze", "study run", "study report", "demo", "presets", "env"]
    + ["configs", *(f"analyze {name}" for name in ("lift", "ratio_bias", "borders", "gradient_variance"))],
)
def test_help_has_one_style(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert command.split()[0] in COMMANDS
    try:
        assert main([*command.split(), "--help"]) == 0
    except SystemExit as stop:
        assert stop.code == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0].startswith(f"usage: sapo-trl {command.split()[0]}") and len(lines) <= 100
    assert max(map(len, lines)) <= 110
    words = shown.replace(",", " ").replace("[", " ").split()
    options = {word for word in words if word.startswith("--")}
    assert "--help" in options
    assert [option for option in options if "-" in option[2:] or option.startswith("--no_")] == []
    assert "(default: None)" not in shown and "(default: )" not in shown
    # A quotation that begins ends: `critic="ladder"`, not `critic="ladder'`.
    assert shown.count('"') % 2 == 0 and not re.search(r"\"\w+'|'\w+\"", shown)


def test_all_settings_of_eval(capsys):
    for option, is_long in (("--help", False), ("--help_all", True)):
        with pytest.raises(SystemExit):
            evaluate([option])
        shown = capsys.readouterr().out
        assert "--temperature" in shown and ("--vllm_tensor_parallel_size" in shown) is is_long
        assert "--help_all" in shown and "--top-p" not in shown


def test_names_of_analyses_with_hyphens_still_work(tmp_path, capsys):
    for name in ("ratio_bias", "ratio-bias"):
        with pytest.raises(SystemExit) as stop:
            main(["analyze", name, str(tmp_path), "--output", str(tmp_path)])
        assert stop.value.code == 2 and "analyze ratio_bias: error: " in capsys.readouterr().err
