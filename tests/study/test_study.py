"""The study: what it runs, what it chooses, and that its report finds what was planted."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml

from sapo_trl.cli import main as cli
from sapo_trl.study import cells
from sapo_trl.study.cells import RESULT_NAME, Cell, comparison_cells, tuning_cells
from sapo_trl.study.comparisons import comparisons, verdict
from sapo_trl.study.config import Qualification, StudyConfig, load_study
from sapo_trl.study.qualification import qualification_tests, write_qualification
from sapo_trl.study.report import write_report
from sapo_trl.study.results import load_results, metrics_of
from sapo_trl.study.run_cell import METRICS_NAME, cell_config
from sapo_trl.study.runner import CELLS_FOLDER, run_study, unused_runs
from sapo_trl.study.tuning import chosen_learning_rates


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
            "seeds": [0, 1, 2, 3, 4],
            "axis": {"sapo": 0, "better": 0.5},
            "axis_label": "share of something",
        },
        # Shares some of the runs above, but not all of their seeds.
        "lengths": {"tasks": ["short", "long"], "arms": ["sapo", "better"], "seeds": [0, 1, 2, 3]},
    },
    "tuning": {"learning_rate": [0.001, 0.002], "seeds": [100], "task": "short"},
    "budget": {"rollouts": 4, "responses": 16, "mini_batches": 2, "test_problems": 32},
    "settings": {"beta": 0.0, "critic_learning_rate": 0.001},
}

QUALIFICATION = {
    "task": "short",
    "seeds": [0, 1, 2, 3, 4],
    "exact": "better",
    "controls": ["equal"],
    "critics": ["sapo"],
}


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
            ({"tuning": {"seeds": [3]}}, r"seeds and tuning\.seeds share \[3\]"),
            ({"tuning": {"task": "middle"}}, r"tuning\.task: 'middle' is not known"),
            ({"tasks": {"short": {"gates": 0}}}, r"tasks\.short: `gates` must be a whole number from 1"),
            ({"experiments": {"main": {"tasks": ["short"], "arms": ["sapo"], "seeds": []}}}, "seeds is empty"),
            ({"experiments": {"main": {"tasks": ["short"], "arms": ["sapo"] * 2, "seeds": [0]}}}, "something twice"),
            ({"tuning": {"learning_rate": ["1e-3"]}}, "with a decimal point"),
            ({"settings": {"max_steps": 3}}, "'max_steps' is decided by the study"),
            ({"records": {"arms": ["bettr"]}}, r"records\.arms: 'bettr' is not known\. Did you mean `better`"),
            ({"qualification": {**QUALIFICATION, "exact": "vineppo"}}, "qualification: 'vineppo' is not known"),
            ({"qualification": {**QUALIFICATION, "looks": 0}}, "looks=0 must be a whole number of at least 1"),
            ({"qualification": {**QUALIFICATION, "critics": []}}, "qualification: critics is empty"),
            ({"qualification": {**QUALIFICATION, "note": 5}}, "qualification: note=5 must be a text"),
            ({"qualification": {**QUALIFICATION, "seeds": [4, 9]}}, r"no experiment runs 'better' on .* seeds \[9\]"),
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
        rates = dict.fromkeys(study.arms, study.tuning.learning_rate[0])
        of_arms = {cell.arm_name: cell for cell in comparison_cells(study, rates)}
        assert of_arms
        for cell in of_arms.values():
            args = cell_config(cell, tmp_path)
            assert args.generation_batch_size == study.budget.responses * cell.arm.samples
            assert args.max_steps == study.budget.rollouts * study.budget.mini_batches


class TestCells:
    def test_arms_differ_in_what_is_compared_and_in_nothing_else(self, tmp_path):
        study = study_from(TINY, tmp_path)
        configs = [cell_config(cell, tmp_path) for cell in tuning_cells(study)]
        shared = ("max_steps", "seed", "beta", "critic_learning_rate", "generation_batch_size", "temperature")
        for name in shared:
            assert len({getattr(config, name) for config in configs}) == 1, name

    def test_tuning_is_equal_and_apart_from_the_comparison(self, tmp_path):
        study = study_from(TINY, tmp_path)
        tuning = tuning_cells(study)
        assert {(c.arm_name, c.learning_rate) for c in tuning} == {
            (arm, rate) for arm in ("sapo", "better", "equal") for rate in (0.001, 0.002)
        }
        assert {c.split for c in tuning} == {"tune"} and {c.seed for c in tuning} == {100}
        compared = comparison_cells(study, {"sapo": 0.001, "better": 0.002, "equal": 0.001})
        assert {c.split for c in compared} == {"test"} and {c.seed for c in compared} == {0, 1, 2, 3, 4}
        assert {c.learning_rate for c in compared if c.arm_name == "sapo_random"} == {0.001}
        # 4 arms on the short task, some runs of which both experiments share, and 2 on the long one.
        assert len(compared) == len({c.name for c in compared}) == 5 * 4 + 4 * 2

    def test_adapters_are_the_study_s_unless_an_arm_has_its_own(self, tmp_path):
        full = changed(lora_rank=8, arms={"equal": {"preset": "grpo", "lora_rank": 0}})
        ranks = {cell.arm_name: cell.lora_rank for cell in tuning_cells(study_from(full, tmp_path))}
        assert ranks == {"sapo": 8, "better": 8, "equal": 0}

    def test_a_cell_survives_its_file(self, tmp_path):
        study = study_from({**TINY, "records": {"seeds": [0], "every": 5}}, tmp_path)
        compared = comparison_cells(study, {"sapo": 0.001, "better": 0.001, "equal": 0.001})
        assert {cell.seed for cell in compared if cell.records is not None} == {0}
        recorded = study_from({**TINY, "records": {"seeds": [0, 1], "arms": ["sapo"], "every": 5}}, tmp_path)
        cells_of_both = comparison_cells(recorded, {"sapo": 0.001, "better": 0.001, "equal": 0.001})
        assert {(c.arm_name, c.seed) for c in cells_of_both if c.records is not None} == {("sapo", 0), ("sapo", 1)}
        for cell in compared:
            assert Cell.from_json(cell.to_json()) == cell

    def test_names_change_with_what_decides_a_run(self, tmp_path):
        def names(content: dict) -> set[str]:
            return {cell.name for cell in tuning_cells(study_from(content, tmp_path))}

        assert names(TINY) == names(changed(name="Another title"))
        assert not names(TINY) & names(changed(budget={"rollouts": 5}))
        assert not names(TINY) & names(changed(lora_rank=4))
        assert not names(TINY) & names(changed(settings={"beta": 0.1}))

    def test_names_change_with_a_preset_of_the_same_name(self, tmp_path, monkeypatch):
        cell = tuning_cells(study_from(TINY, tmp_path))[0]
        before = cell.name
        monkeypatch.setattr(cells, "preset_settings", lambda name: {"lam": 0.5})
        assert cell.name != before

    def test_finished_runs_of_another_version_are_named(self, tmp_path):
        study, former = study_from(TINY, tmp_path), study_from(changed(budget={"rollouts": 5}), tmp_path)
        cells_dir = tmp_path / "runs" / CELLS_FOLDER
        known, not_finished = tuning_cells(former)[:2]
        for cell in [tuning_cells(study)[0], known, not_finished]:
            (cells_dir / cell.name).mkdir(parents=True)
            if cell is not not_finished:
                (cells_dir / cell.name / RESULT_NAME).write_text("{}")
        assert unused_runs(tuning_cells(study), cells_dir) == [known.name]
        assert unused_runs(tuning_cells(study)[2:], cells_dir) == []

    def test_settings_that_do_not_fit_stop_a_study_before_it_runs(self, tmp_path):
        study = study_from(changed(arms={"equal": {"preset": "grpo", "settings": {"lam": 7.0}}}), tmp_path)
        with pytest.raises(ValueError, match=r"arms\.equal: .*lam"):
            run_study(study, tmp_path / "runs", cache_dir=tmp_path / "cache")
        assert not (tmp_path / "cache").exists()

    def test_the_best_mean_is_chosen_and_of_equals_the_smallest(self, tmp_path):
        study = study_from(changed(tuning={"seeds": [100, 101]}), tmp_path)
        accuracies = {("sapo", 0.002, 100): 0.9, ("sapo", 0.002, 101): 0.1, ("sapo", 0.001, 100): 0.6}
        results = [
            (c, {"accuracy": accuracies.get((c.arm_name, c.learning_rate, c.seed), 0.5), "seconds": 1.0})
            for c in tuning_cells(study)
        ]
        # sapo: 0.55 beats 0.5; the others are level.
        assert chosen_learning_rates(results) == {"sapo": 0.001, "better": 0.001, "equal": 0.001}


def write_synthetic_runs(study: StudyConfig, output_dir: Path, effects: dict[str, float]) -> None:
    """Finished runs as they would be if the arms had these effects."""
    rng = np.random.default_rng(0)
    level = {seed: rng.normal(0.5, 0.05) for seed in range(5)}
    learning_rates = {"sapo": 0.001, "better": 0.001, "equal": 0.001}
    for cell in [*tuning_cells(study), *comparison_cells(study, learning_rates)]:
        accuracy = 0.5 if cell.split == "tune" else level[cell.seed] + effects[cell.arm_name] + rng.normal(0, 0.01)
        folder = output_dir / CELLS_FOLDER / cell.name
        folder.mkdir(parents=True)
        rows = [{"step": 2 * i + 2, "reward": accuracy * i / 4, "entropy": 1.0} for i in range(4)]
        (folder / METRICS_NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = {
            "arm": cell.arm_name,
            "preset": cell.arm.preset,
            "task": cell.task_name,
            "seed": cell.seed,
            "learning_rate": cell.learning_rate,
            "split": cell.split,
            "measure": cell.measure,
            "failed": None,
            "seconds": 4.0,
            "cpu_seconds": 3.0,
            "optimizer_steps": 8,
            "completions": 64,
            "rollout_tokens": 640.0,
            "sampled_tokens": 640.0,
            "reward_curve": [row["reward"] for row in rows],
            "accuracy": accuracy,
            "greedy_accuracy": accuracy + 0.1,
            "environment": {"commit": "0123456789ab", "torch": "2.13.0"},
        }
        (folder / RESULT_NAME).write_text(json.dumps(result))


class TestReport:
    @pytest.fixture(scope="class")
    def planted(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("planted")
        study = study_from(TINY, folder)
        effects = {"sapo": 0.0, "better": 0.1, "equal": 0.0, "sapo_random": -0.1}
        write_synthetic_runs(study, folder, effects)
        results = load_results(study, folder)
        write_report(study, results, folder / "report.md", folder / "figures")
        return study, results, folder

    def test_what_was_planted_is_found_and_nothing_else(self, planted):
        study, results, _ = planted
        table = comparisons(study, results)[0].table.set_index("arm")
        found = {arm: verdict(row) for arm, row in table.iterrows()}
        assert found == {"sapo": "", "better": "better", "equal": "not significant", "sapo_random": "worse"}
        assert table.loc["better", "difference"] == pytest.approx(0.1, abs=0.02)

    def test_the_report_says_so(self, planted):
        _, _, folder = planted
        text = (folder / "report.md").read_text()
        lines = {line.split("**")[1]: line for line in text.splitlines() if line.startswith("- **")}
        assert "`better` on short" in lines["Better than `sapo`"] and "`better` on long" in lines["Better than `sapo`"]
        assert "`sapo_random` on short" in lines["Worse than `sapo`"]
        assert "`equal` on short" in lines["Not significantly different from `sapo`"]
        assert "missing" not in text
        # Each experiment has its own seeds' runs.
        rows = [line for line in text.splitlines() if line.startswith("| ") and "responses" not in line]
        assert sum("| 5 | 0." in row for row in rows) == 4 and sum("| 4 | 0." in row for row in rows) == 2 + 2
        assert "P(beats `sapo`)" in text and "| 1.00 [1.000, 1.000] |" in text

    @pytest.mark.parametrize(
        ("exact", "control", "explained", "verdict"),
        [
            ("better", "equal", 0.3, "`short` qualifies"),
            ("equal", "sapo", 0.3, "does not qualify** (accuracy of `equal` minus accuracy of `sapo`)"),
            ("better", "equal", 0.0, "does not qualify** (explained variance of Monte-Carlo values by the critic of"),
            ("sapo_random", "sapo", 0.3, "does not qualify** (accuracy of `sapo_random` minus"),
            ("better", "equal", None, "does not qualify** (some of its runs are missing)"),
            # One that knows is enough, beside one that does not.
            ("better", "equal", (0.3, 0.0), "`short` qualifies"),
            ("better", "equal", (0.0, 0.0), "does not qualify** (explained variance"),
        ],
    )
    def test_a_task_qualifies_by_exact_credit_and_a_critic_that_knows(
        self, planted, tmp_path, exact, control, explained, verdict
    ):
        study, results, _ = planted
        wanted = Qualification(task="short", seeds=[0, 1, 2, 3, 4], exact=exact, controls=[control], critics=["sapo"])
        if isinstance(explained, tuple):
            wanted = replace(wanted, critics=["sapo", "equal"])
            of_arm = dict(zip(wanted.critics, explained, strict=True))
        else:
            of_arm = {"sapo": explained}
        runs, rng = results.runs.copy(), np.random.default_rng(0)
        folders = []
        for _, run in runs.iterrows():
            folder = tmp_path / "runs" / Path(run["folder"]).name
            folder.mkdir(parents=True)
            rows = [json.loads(line) for line in (Path(run["folder"]) / METRICS_NAME).read_text().splitlines()]
            if of_arm.get(run["arm"]) is not None:
                rows[0]["critic/diagnostics/explained_variance"] = 0.9  # not the last one: says nothing
                rows[2]["critic/diagnostics/explained_variance"] = of_arm[run["arm"]] + rng.normal(0, 0.05)
            (folder / METRICS_NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))
            folders.append(str(folder))
        runs["folder"] = folders
        results = replace(results, runs=runs)
        text = write_qualification(replace(study, qualification=wanted), results)
        assert verdict in text
        if explained == 0.3:
            tests = qualification_tests(wanted, results)
            assert len(tests.controls) == 1
            (critic,) = tests.critics.values()
            assert critic.interval.value == pytest.approx(0.3, abs=0.1) and critic.pairs == 5

    def test_who_has_looked_more_often_has_to_be_surer(self, planted):
        study, results, _ = planted
        wanted = Qualification(
            task="short", seeds=[0, 1, 2, 3, 4], exact="better", controls=["equal"], critics=["sapo"]
        )
        (control,) = qualification_tests(wanted, results).controls.values()
        enough = int(0.05 / control.p_value)
        assert enough >= 1
        for looks, failed in ((enough, False), (enough + 1, True)):
            asked = replace(study, qualification=replace(wanted, looks=looks))
            assert ("does not qualify** (accuracy of `better`" in write_qualification(asked, results)) == failed

    def test_the_qualification_has_its_note(self, planted, tmp_path):
        _, results, _ = planted
        without = write_qualification(study_from(changed(qualification=QUALIFICATION), tmp_path), results)
        noted = changed(qualification={**QUALIFICATION, "note": "This is\nthe second look.\n"})
        text = write_qualification(study_from(noted, tmp_path), results)
        assert text == f"{without}\nThis is\nthe second look.\n"  # a paragraph of its own, at the end

    def test_every_picture_is_there_with_its_data(self, planted):
        _, _, folder = planted
        links = [part.split(")")[0] for part in (folder / "report.md").read_text().split("](")[1:]]
        pictures = [link for link in links if link.endswith(".png")]
        assert len(pictures) >= 6
        axis = pd.read_csv(folder / "figures" / "main_short_axis.csv")
        assert {tuple(row) for row in axis[["arm", "share of something"]].to_numpy()} == {("sapo", 0), ("better", 0.5)}
        for picture in pictures:
            assert (folder / picture).stat().st_size > 5000
            assert (folder / picture).with_suffix(".csv").stat().st_size > 20

    def test_an_unfinished_study_says_what_is_missing(self, planted, tmp_path):
        study, _, folder = planted
        one = next((folder / CELLS_FOLDER).glob("test-long-better-seed3*")) / RESULT_NAME
        content = one.read_text()
        one.unlink()
        try:
            results = load_results(study, folder)
            assert len(results.missing) == 1 and "long-better-seed3" in results.missing[0]
            write_report(study, results, tmp_path / "report.md", tmp_path / "figures")
            assert "not finished: 1 runs are missing" in (tmp_path / "report.md").read_text()
        finally:
            one.write_text(content)

    def test_a_result_of_another_version_and_a_cut_log(self, planted, tmp_path, capsys, caplog):
        study, _, folder = planted
        shutil.copytree(folder / CELLS_FOLDER, tmp_path / CELLS_FOLDER)
        one = next((tmp_path / CELLS_FOLDER).glob("test-long-better-seed3*"))
        content = json.loads((one / RESULT_NAME).read_text())
        run = pd.Series({**content, "folder": str(one)})
        (one / METRICS_NAME).write_text((one / METRICS_NAME).read_text()[:-9])
        assert metrics_of(run)["step"].tolist() == [2, 4, 6] and "the last line is cut" in caplog.text
        (one / METRICS_NAME).write_text("{}\n[]\n")
        with pytest.raises(ValueError, match=f"{one / METRICS_NAME}, line 2: the content must be an object"):
            metrics_of(run)
        # Names are the folder's, not what the file in it says, and the report writes its texts as texts.
        edited = content | {"arm": "equal", "environment": {"torch": "<img src=x>|"}}
        (one / RESULT_NAME).write_text(json.dumps(edited))
        results = load_results(study, tmp_path)
        assert results.scores("long", "better")[3] == content["accuracy"]
        write_report(study, results, tmp_path / "report.md", tmp_path / "figures")
        assert r"\<img src=x\>\|" in (tmp_path / "report.md").read_text()
        config = tmp_path / "study.yaml"
        config.write_text(yaml.safe_dump(TINY))
        for change, message in (
            ({"accuracy": "high"}, "`accuracy` must be a number"),
            ({"seconds": None}, "`seconds`"),
        ):
            (one / RESULT_NAME).write_text(json.dumps(content | change))
            assert cli(["study", "report", "--config", str(config), "--output-dir", str(tmp_path)]) == 2
            error = capsys.readouterr().err
            assert f"{one / RESULT_NAME}: {message}" in error and error.count("\n") == 1

    @pytest.mark.parametrize(
        "kept", ["test-short-sapo-seed0", "test-short-better", "test-long-sapo", "test-short-equal"]
    )
    def test_a_report_of_any_part_of_a_study(self, kept, planted, tmp_path):
        study, _, folder = planted
        for cell in (folder / CELLS_FOLDER).iterdir():
            if cell.name.startswith(("tune", kept)):
                shutil.copytree(cell, tmp_path / CELLS_FOLDER / cell.name)
        results = load_results(study, tmp_path)
        write_report(study, results, tmp_path / "report.md", tmp_path / "figures")
        assert "not finished" in (tmp_path / "report.md").read_text()

    def test_diverged_and_untested_runs_are_named(self, planted, tmp_path):
        study, results, _ = planted
        runs = results.runs[(results.runs["seed"] == 0) & (results.runs["task"] == "short")].copy()
        runs["failed"] = [None if arm != "equal" else "not finite" for arm in runs["arm"]]
        write_report(study, replace(results, runs=runs), tmp_path / "report.md", tmp_path / "figures")
        text = (tmp_path / "report.md").read_text()
        assert "**Diverged**, counted as accuracy 0: `equal` (seed 0, short)." in text
        assert "**Not tested, because there are too few seeds**: `better` on short (" in text

    def test_nothing_to_report(self, tmp_path):
        with pytest.raises(ValueError, match="6 of 6 tuning runs are not finished"):
            load_results(study_from(TINY, tmp_path), tmp_path)


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
    """`make study-quick`: finished runs are never run again, others are, and no process is left behind."""
    command = [sys.executable, "-m", "sapo_trl.cli", "study", "run", "--config", str(STUDIES / "quick.yaml")]
    command += ["--output-dir", str(tmp_path / "runs")]
    cells = tmp_path / "runs" / CELLS_FOLDER
    process = subprocess.Popen(command, cwd=ROOT)
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
    assert len(finished) < 6
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    after = {path: path.stat().st_mtime_ns for path in cells.glob(f"*/{RESULT_NAME}")}
    assert len(after) == 6
    assert all(after[path] == written for path, written in finished.items())
    report = (tmp_path / "runs" / "report.md").read_text()
    assert "missing" not in report
    for title in ("Are segment critics steadier?", "Do values jump", "fall on true borders?", "geometric-mean ratio"):
        assert title in report
