"""The study's file and command, and that a killed study goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from sapo_trl.cli import main as cli
from sapo_trl.study.cells import RESULT_NAME, Choice, comparison_cells
from sapo_trl.study.config import StudyConfig, load_study
from sapo_trl.study.run_cell import cell_config
from sapo_trl.study.runner import CELLS_FOLDER

from .micro import MICRO, write_study
from .recompute import recompute


ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "trainer_configs" / "study"

TINY = {
    "name": "A tiny study",
    "tasks": {"short": {"gates": 2}, "long": {"gates": 4}},
    "arms": {
        "sapo": {"preset": "sapo"},
        "better": {"preset": "ppo"},
        "equal": {"preset": "grpo"},
        "sapo_random": {"preset": "sapo", "segmenter": "random_cuts", "tuned_as": "sapo"},
    },
    "experiments": {
        "main": {
            "tasks": ["short"],
            "arms": ["sapo", "better", "equal", "sapo_random"],
            "worlds": [0, 1, 2],
            "seeds": [0, 1, 2],
            "axis": {"sapo": 0, "better": 0.5},
            "axis_label": "share of something",
        },
        # Shares some of the runs above, but not all of their seeds and worlds.
        "lengths": {"tasks": ["short", "long"], "arms": ["sapo", "better"], "worlds": [0, 1], "seeds": [0, 1]},
        "single": {"tasks": ["short"], "arms": ["sapo", "better"], "seeds": [0]},
    },
    "tuning": {"learning_rate": [0.001, 0.002], "seeds": [100], "task": "short"},
    "budget": {"rollouts": 4, "responses": 16, "mini_batches": 2, "test_problems": 32},
    "settings": {"beta": 0.0, "critic_learning_rate": 0.001},
}

TEST = {
    "claim": "Better is better",
    "experiment": "main",
    "measure": "log_odds",
    "test": "welch",
    "smallest": 0.2,
    "contrast": {"better": 1, "sapo": -1},
}


DOUBLE = {"contrast": {"better": 2, "sapo": -2}}


def registering(**changes) -> dict:
    """A section with one test that has these changes."""
    return {"tests": {"one": {**TEST, **changes}}}


def study_from(content: dict, folder: Path) -> StudyConfig:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_study(path)


def changed(**sections) -> dict:
    content = json.loads(json.dumps(TINY))
    for name, entries in sections.items():
        content[name] = {**content.get(name, {}), **entries} if isinstance(entries, dict) else entries
    return content


class TestConfig:
    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            ({"arms": {"new": {"preset": "sappo"}}}, r"arms\.new: preset=.sappo. does .* you mean `sapo`\?"),
            ({"arms": {"new": {"preset": "ppo", "settings": {"lamb": 1}}}}, r"settings: .lamb. is not known\..*`lam`"),
            ({"arms": {"new": {"preset": "ppo", "boundary_noise": 0.5}}}, "belongs to `segmenter: noisy`"),
            ({"arms": {"new": {"preset": "ppo", "tuned_as": "sapo_random"}}}, "is not tuned itself"),
            ({"budget": {"responses": 15}}, r"budget: responses=15 must be a multiple of mini_batches=2"),
            ({"budget": {"response": 15}}, r"budget: 'response' is not known\. Did you mean `responses`"),
            ({"tuning": {"seeds": [2]}}, r"seeds and tuning\.seeds share \[2\]"),
            ({"tuning": {"task": "middle"}}, r"tuning\.task: 'middle' is not known"),
            ({"tasks": {"short": {"gates": 0}}}, r"tasks\.short: `gates` must be a whole number from 1"),
            ({"experiments": {"main": {"tasks": ["short"], "arms": ["sapo"], "seeds": []}}}, "seeds is empty"),
            ({"experiments": {"main": {"tasks": ["short"], "arms": ["sapo"] * 2, "seeds": [0]}}}, "something twice"),
            ({"tuning": {"learning_rate": ["1e-3"]}}, "with a decimal point"),
            ({"settings": {"max_steps": 3}}, "'max_steps' is decided by the study"),
            ({"records": {"arms": ["bettr"]}}, r"records\.arms: 'bettr' is not known\. Did you mean `better`"),
            ({"records": {"valued_arms": ["bettr"]}}, r"records\.valued_arms: 'bettr' is not known"),
            ({"seconds": {"bettr": 5}}, r"seconds: 'bettr' is not known\. Did you mean `better`"),
            ({"arms": {"new": {"preset": "ppo", "learning_rate": 1}}}, r"arms\.new: learning_rate=1 must be"),
            ({"arms": {"new": {"preset": "ppo", "choices": [{"lamb": 1}]}}}, r"settings: .lamb. is not known"),
            ({"arms": {"new": {"preset": "ppo", "choices": [{"lam": 1.0}], "tuned_as": "sapo"}}}, "only one of"),
            ({"preregistered": registering(experiment="mian")}, r"tests\.one\.experiment: 'mian' is not known"),
            ({"preregistered": registering(contrast={"bettr": 1, "sapo": -1})}, r"tests\.one: 'bettr' is not known"),
            ({"preregistered": registering(contrast={"better @ long": 1, "sapo": -1})}, r"one: 'long' is not known"),
            ({"preregistered": registering(contrast={"better": 1, "sapo": -2})}, "weights must add up to 0"),
            ({"preregistered": registering(test="fisher")}, "test='fisher' is for lost_form, not for 'log_odds'"),
            ({"preregistered": registering(measure="accuracy", test="permutation", **DOUBLE)}, "weights 1 and -1"),
            ({"preregistered": registering(smallest=0)}, "smallest=0 must be above 0"),
            ({"preregistered": registering(side="up")}, "side='up' must be one of two, greater, less"),
            ({"preregistered": registering(experiment="single")}, "'single' needs two seeds or more"),
            ({"preregistered": {"level": 5}}, r"preregistered: level=5 must lie in \(0, 1\)"),
            ({"experiments": {"main": {**TINY["experiments"]["main"], "axis": {"sapoo": 1}}}}, "axis: 'sapoo' is not"),
            ({"baseline": "grpo"}, r"baseline: 'grpo' is not known"),
            ({"lora_rank": -1}, r"lora_rank=-1 must be at least 0"),
            ({"arms": {"new": {"preset": "ppo", "lora_rank": -2}}}, r"arms\.new: lora_rank=-2 must be at least 0"),
        ],
    )  # fmt: skip
    def test_errors_name_the_entry(self, sections, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            study_from(changed(**sections), tmp_path)

    def test_no_mapping(self, tmp_path):
        (tmp_path / "study.yaml").write_text("- 1\n")
        with pytest.raises(ValueError, match="must hold a mapping"):
            load_study(tmp_path / "study.yaml")

    @pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
    def test_every_arm_of_the_published_studies_is_a_valid_configuration(self, path, tmp_path):
        study = load_study(path)
        choices = dict.fromkeys(study.arms, Choice(study.tuning.learning_rate[0], {}))
        of_arms = {(cell.arm_name, cell.measure): cell for cell in comparison_cells(study, choices)}
        assert of_arms
        for cell in of_arms.values():
            args = cell_config(cell, tmp_path)
            if cell.measure != "credit":
                assert args.generation_batch_size == study.budget.responses * cell.arm.samples
                assert args.max_steps == study.budget.rollouts * study.budget.mini_batches


class TestCommand:
    def test_bad_input(self, tmp_path, capsys):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(changed(tuning={"task": "middle"})))
        assert cli(["study", "report", "--config", str(tmp_path / "study.yaml")]) == 2
        assert "tuning.task: 'middle' is not known" in " ".join(capsys.readouterr().err.split())
        assert cli(["study", "run", "--config", str(tmp_path / "missing.yaml")]) == 2

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as stop:
            cli(["study", "--help"])
        assert stop.value.code == 0
        assert "run the missing runs of a study" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(tmp_path):
    """Finished runs are never run again, others are, and no process is left behind."""
    write_study(tmp_path, {**MICRO, "experiments": {"main": MICRO["experiments"]["main"]}})
    command = [sys.executable, "-m", "sapo_trl.cli", "study", "run", "--config", str(tmp_path / "study.yaml")]
    command += ["--output-dir", str(tmp_path / "runs")]
    environment = {**os.environ, "SAPO_TRL_CACHE": str(tmp_path / "cache")}
    cells = tmp_path / "runs" / CELLS_FOLDER
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    deadline = time.monotonic() + 600
    while not list(cells.glob(f"*/{RESULT_NAME}")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    left_behind = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in cells.glob(f"*/{RESULT_NAME}")}
    # The cells notice; one that has just been started does so once it runs.
    assert left_behind and not psutil.wait_procs(left_behind, timeout=120)[1]
    assert len(finished) < 9
    again = subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600, capture_output=True, text=True)
    assert f"9 runs, {len(finished)} of them finished" in again.stdout
    after = {path: path.stat().st_mtime_ns for path in cells.glob(f"*/{RESULT_NAME}")}
    assert len(after) == 9
    assert all(after[path] == written for path, written in finished.items())
    report = (tmp_path / "runs" / "report.md").read_text()
    assert "missing" not in report and "no verdict" not in report
    for title in ("Verdicts", "Do critics learn?", "fall on true borders?", "geometric-mean ratio"):
        assert title in report
    checked = recompute(tmp_path / "study.yaml", tmp_path / "runs" / "report.md", tmp_path / "runs" / "figures")
    assert checked["verdicts"] == 12
