"""`sapo-trl analyze` on a real run's recordings, and the errors for folders and files that are something else."""

import io
import json
import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from sapo_trl import SegmentationCallback, ValueDiagnostics
from sapo_trl.analysis import read_log_history, read_responses, read_values, token_jumps
from sapo_trl.analysis.command import main
from sapo_trl.cli import main as cli_main
from tests.conftest import FAMILIES
from tests.testing_utils import sapo_trainer


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tokenizer) -> Path:
    """A run with everything recorded: eight rollouts of four responses."""
    folder = tmp_path_factory.mktemp("run")
    trainer = sapo_trainer(
        FAMILIES["qwen2"](tokenizer),
        folder,
        max_steps=16,
        learning_rate=0.01,
        trainer_kwargs={
            "callbacks": [
                SegmentationCallback(folder / "segments"),
                ValueDiagnostics(every=2, num_continuations=3, max_responses=4, output_dir=folder / "values"),
            ]
        },
    )
    trainer.train()
    trainer.save_state()
    return folder


def analyse(*arguments) -> str:
    printed = io.StringIO()
    assert main([str(argument) for argument in arguments], Console(file=printed, width=160)) == 0
    return printed.getvalue()


def written(output: str) -> list[Path]:
    paths = [Path(line) for line in output.splitlines() if line.endswith((".png", ".csv"))]
    for path in paths:
        if path.suffix == ".png":
            assert path.with_suffix(".csv") in paths
            with Image.open(path) as image:
                assert min(image.size) > 300
    return paths


class TestCommands:
    def test_lift(self, run_folder, tmp_path):
        output = analyse(
            "lift", run_folder, "--values", run_folder / "values", "--output", tmp_path, "--resamples", 50
        )
        paths = written(output)
        assert [path.name for path in paths] == [
            "lift.png", "lift.csv", "lift_trend.csv",
            "lift_monte_carlo.png", "lift_monte_carlo.csv", "lift_monte_carlo_trend.csv",
        ]  # fmt: skip
        points = pd.read_csv(tmp_path / "lift.csv")
        assert points["curve"].unique().tolist() == ["all", "early", "middle", "late"]
        assert (points.groupby("curve")["share"].count() == 20).all()
        assert points[points["share"] == 1]["lift"].tolist() == pytest.approx([1.0] * 4)
        trends = pd.read_csv(tmp_path / "lift_trend.csv").set_index("curve")
        assert trends.loc["all", "jumps"] == trends.loc[["early", "middle", "late"], "jumps"].sum()
        assert "Lift between valued states" in output and "MC squared" in output

    def test_recordings_hold_what_the_analyses_take(self, run_folder):
        responses = read_responses(run_folder, columns=("segment_ids", "entropies", "values", "tokens"))
        assert len(responses) == 32 and responses["step"].unique().tolist() == list(range(0, 16, 2))
        assert responses.groupby("step")["response"].apply(list).tolist() == [[0, 1, 2, 3]] * 8
        assert len(token_jumps(responses)) == sum(len(row) - 1 for row in responses["values"])
        values = read_values(run_folder)
        recorded = responses.set_index(["step", "process", "response"])
        assert values["step"].unique().tolist() == [0, 4, 8, 12]
        for row in values.to_dict("records"):
            # The critic's value in one file is the one at the segment's first token in the other.
            response = recorded.loc[(row["step"], row["process"], row["response"])]
            first = list(response["segment_ids"]).index(row["segment"])
            assert response["values"][first] == pytest.approx(row["value"])

    def test_ratio_bias(self, run_folder, tmp_path):
        output = analyse("ratio_bias", run_folder, "--output", tmp_path)
        assert [path.name for path in written(output)] == ["ratio_bias.png", "ratio_bias.csv"]
        table = pd.read_csv(tmp_path / "ratio_bias.csv")
        assert table["step"].tolist() == list(range(1, 17))
        assert (table["bias"] <= table["bound"] + 1e-7).all() and table["bias"].max() > 1e-5
        lines = tmp_path / "log.jsonl"
        history = json.loads((run_folder / "trainer_state.json").read_text())["log_history"]
        lines.write_text("".join(json.dumps(entry) + "\n" for entry in history))
        assert analyse("ratio_bias", lines, "--output", tmp_path / "again").splitlines()[:6] == output.splitlines()[:6]

    def test_borders(self, run_folder, tmp_path):
        responses = read_responses(run_folder, columns=("segment_ids",))
        entries = [
            {
                "step": row.step,
                "process": row.process,
                "response": row.response,
                "borders": (np.flatnonzero(np.diff(row.segment_ids))).tolist(),
            }
            for row in responses.itertuples()
        ]
        file = tmp_path / "borders.jsonl"
        file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        arguments = (run_folder, "--output", tmp_path, "--resamples", 50)
        output = analyse("borders", *arguments, "--borders", file)
        assert [path.name for path in written(output)] == ["borders.png", "borders.csv"]
        table = pd.read_csv(tmp_path / "borders.csv")
        assert (table["value"] == 1).all() and (table["chance"] < 1).all()
        assert "by chance" in analyse("borders", *arguments, "--pattern", "[aeiou]")
        assert "nan" in analyse("borders", *arguments, "--pattern", "no such text")

    def test_gradient_variance(self, tmp_path):
        noise = {"steps": 8, "parameters": 3, "trace": 2.0, "squared_mean": 0.5, "noise_to_signal": 4.0}
        noise |= {"trace_error": 0.1, "squared_mean_error": 0.1, "noise_to_signal_error": 1.0}
        for name in ("token", "segment"):
            (tmp_path / f"{name}.json").write_text(json.dumps(noise))
        results = [f"{name}={tmp_path / name}.json" for name in ("token", "segment")]
        output = analyse("gradient_variance", *results, "--output", tmp_path / "out")
        assert "2 ± 0.1" in output
        assert [path.name for path in written(output)] == ["gradient_variance.png", "gradient_variance.csv"]
        assert pd.read_csv(tmp_path / "out" / "gradient_variance.csv")["setting"].tolist() == ["token", "segment"]


class TestErrors:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path_factory, monkeypatch):
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))

    def error(self, capsys, *arguments) -> str:
        with pytest.raises(SystemExit) as raised:
            cli_main(["analyze", *(str(argument) for argument in arguments)])
        assert raised.value.code == 2
        return capsys.readouterr().err

    def one_line(self, capsys, *arguments) -> str:
        error = self.error(capsys, *arguments, "--output", "never-written")
        assert error.count("\n") == 1 and error.startswith(f"sapo-trl analyze {arguments[0]}: error: ")
        assert not Path("never-written").exists()
        return error

    def test_command_lines(self, capsys):
        assert "ANALYSIS" in self.error(capsys)
        assert "--output" in self.error(capsys, "lift", "somewhere")
        assert "invalid choice" in self.error(capsys, "no-such-analysis")

    def test_help(self, capsys):
        for arguments in (["--help"], ["lift", "--help"], ["borders", "--help"]):
            with pytest.raises(SystemExit) as raised:
                main(arguments)
            assert raised.value.code == 0 and "sapo-trl analyze" in capsys.readouterr().out

    def test_folders(self, capsys, tmp_path):
        assert f"{tmp_path}/none: there is no such folder" in self.one_line(capsys, "lift", tmp_path / "none")
        error = self.one_line(capsys, "lift", tmp_path)
        assert "no file segments_<step>_<process>.parquet" in error and "`SegmentationCallback(output_dir=…)`" in error
        assert f"{tmp_path}: neither a `trainer_state.json`" in self.one_line(capsys, "ratio_bias", tmp_path)
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "segments_000000_000.parquet").touch()
        assert "name one of" in self.one_line(capsys, "lift", tmp_path)

    def test_files(self, capsys, tmp_path):
        path = tmp_path / "segments_000000_000.parquet"
        path.write_text("not parquet")
        assert f"{path}: not a parquet file" in self.one_line(capsys, "lift", tmp_path)
        row = {"step": 0, "reward": 1.0, "segment_ids": [0, 1], "entropies": [0.1, 0.2], "values": [0.0, 0.0]}
        pd.DataFrame([row]).drop(columns="values").to_parquet(path)
        assert f"{path}: column `values` is missing; it has ['entropies'" in self.one_line(capsys, "lift", tmp_path)
        pd.DataFrame([row | {"values": 0.5}]).to_parquet(path)
        error = self.one_line(capsys, "lift", tmp_path)
        assert f"{path}, row 0: `values` must be a list of numbers, got '0.5'" in error
        pd.DataFrame([row | {"values": [0.5]}]).to_parquet(path)
        assert "lists of response 0 differ in length" in self.one_line(capsys, "lift", tmp_path)
        pd.DataFrame([row]).to_parquet(path)
        assert "no critic that values every token" in self.one_line(capsys, "lift", tmp_path)
        (tmp_path / "segments_000000_000.json").write_text(json.dumps(row) + "\n")
        assert "two formats; keep one" in self.one_line(capsys, "lift", tmp_path)

    def test_values(self, capsys, run_folder, tmp_path):
        arguments = ("lift", run_folder, "--resamples", 2)
        (tmp_path / "values_000000_000.parquet").touch()
        assert "not a parquet file" in self.one_line(capsys, *arguments, "--values", tmp_path)

    def test_bootstrap_settings(self, capsys, run_folder):
        assert "`confidence` must lie in (0, 1), got 2.0" in self.one_line(
            capsys, "lift", run_folder, "--confidence", 2
        )

    def test_logs(self, capsys, tmp_path):
        state = tmp_path / "trainer_state.json"
        state.write_text("{")
        assert f"{state}: not JSON" in self.one_line(capsys, "ratio_bias", tmp_path)
        state.write_text("{}")
        assert f"{state}: no `log_history` in it" in self.one_line(capsys, "ratio_bias", tmp_path)
        state.write_text('{"log_history": []}')
        assert f"{state}: the log must have at least one entry" in self.one_line(capsys, "ratio_bias", tmp_path)
        state.write_text('{"log_history": [{"step": 1, "loss": 2.0}]}')
        assert "`ratio/geometric_bias` is not in the log" in self.one_line(capsys, "ratio_bias", tmp_path)

    def test_a_log_that_was_cut_is_read_as_far_as_it_goes(self, capsys, tmp_path, caplog):
        entries = [
            {"step": step, "ratio/geometric_bias": 0.1, "ratio/geometric_bias_bound": 0.2} for step in (1, 2, 3)
        ]
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        path = tmp_path / "log.jsonl"
        path.write_text(lines[:-20])
        with caplog.at_level(logging.WARNING):
            assert read_log_history(path)["step"].tolist() == [1, 2]
        assert f"{path}: the last line is cut" in caplog.text
        path.write_text(lines.replace('"step": 2', '"step"; 2'))
        assert f"{path}, line 2: not JSON" in self.one_line(capsys, "ratio_bias", path)
        path.write_text("[" * 100_000 + "\n" + lines)
        assert f"{path}, line 1: not JSON" in self.one_line(capsys, "ratio_bias", path)
        path.write_text(lines.replace('"step": 2', '"step": "two"'))
        assert f"{path}, row 1: `step` must be a number or empty, got 'two'" in self.one_line(
            capsys, "ratio_bias", path
        )
        path.write_text(lines.replace('"ratio/geometric_bias": 0.1', '"ratio/geometric_bias": "low"'))
        assert f"{path}: `ratio/geometric_bias` in the log must be a number" in self.one_line(
            capsys, "ratio_bias", path
        )

    def test_last_checkpoint_is_read(self, tmp_path):
        for step in (9, 10):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step}]}))
        (tmp_path / "checkpoint-11").mkdir()  # without its state
        assert read_log_history(tmp_path)["step"].tolist() == [10]

    def test_borders(self, capsys, run_folder, tmp_path):
        assert "`--pattern` is not a regular expression: '['" in self.one_line(
            capsys, "borders", run_folder, "--pattern", "["
        )
        file = tmp_path / "borders.jsonl"
        assert f"{file}: there is no such file" in self.one_line(capsys, "borders", run_folder, "--borders", file)
        file.write_text('{"step": 0}\n')
        error = self.one_line(capsys, "borders", run_folder, "--borders", file)
        assert f"{file}, line 1: not an object with step, process, response, borders" in error
        file.write_text('{"step": 0, "process": 0, "response": 0, "borders": []}\n')
        error = self.one_line(capsys, "borders", run_folder, "--borders", file)
        assert re.search("no borders of step 0, process 0, response 1", error)

    def test_gradient_variance(self, capsys, tmp_path):
        assert "given as NAME=FILE, got 'x.json'" in self.one_line(capsys, "gradient_variance", "x.json")
        assert "the name 'a' twice" in self.one_line(capsys, "gradient_variance", "a=x", "a=y")
