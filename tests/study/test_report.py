"""The study's report: it finds what was planted, calls nothing else a verdict, and its numbers can be recomputed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from sapo_trl.cli import main as cli
from sapo_trl.study.cells import RESULT_NAME, Choice, comparison_cells, tuning_cells
from sapo_trl.study.comparisons import comparisons
from sapo_trl.study.config import StudyConfig
from sapo_trl.study.figures import groups_of, training_curves
from sapo_trl.study.preregistration import FROZEN_NAME, changed_tests, freeze
from sapo_trl.study.report import write_report
from sapo_trl.study.results import load_results, metrics_of
from sapo_trl.study.run_cell import METRICS_NAME
from sapo_trl.study.runner import CELLS_FOLDER
from sapo_trl.study.verdicts import verdicts

from .recompute import recompute, tables_of
from .test_study import TEST, TINY, changed, study_from


BROKEN = "equal"
"""The arm whose runs lose their form."""
EFFECTS = {"sapo": 0.0, "better": 1.0, "equal": 0.0, "sapo_random": -1.0}
TESTS = {
    "better": TEST,
    "worse": {**TEST, "contrast": {"sapo_random": 1, "sapo": -1}},
    "equal": {**TEST, "contrast": {"equal": 1, "sapo": -1}, "smallest": 0.3},
    "unclear": {**TEST, "contrast": {"equal": 1, "sapo": -1}, "side": "two", "smallest": 0.001},
    "order": {**TEST, "test": "trend", "contrast": {"sapo_random": 0, "sapo": 1, "better": 2}},
    "accuracy": {**TEST, "measure": "accuracy", "test": "permutation", "smallest": 0.01},
    "form": {**TEST, "measure": "lost_form", "test": "fisher", "contrast": {"equal": 1, "sapo": -1}, "smallest": 0.1},
    "interaction": {
        **TEST,
        "experiment": "lengths",
        "side": "less",
        "contrast": {"better @ long": 1, "sapo @ long": -1, "better @ short": -1, "sapo @ short": 1},
    },
}
FOUND = {
    "better": "held",
    "worse": "not held",
    "equal": "not held",
    "unclear": "cannot tell",
    "order": "held",
    "accuracy": "held",
    "form": "held",
    "interaction": "not held",
}


def write_synthetic_runs(study: StudyConfig, output_dir: Path, effects: dict[str, float]) -> None:
    """Finished runs as they would be if the arms had these effects on log-odds."""
    rng = np.random.default_rng(0)
    levels = {world: rng.normal(2.0, 1.0) for world in range(3)}
    chosen = dict.fromkeys(("sapo", "better", "equal"), Choice(0.001, {}))
    for cell in [*tuning_cells(study), *comparison_cells(study, chosen)]:
        odds = levels[cell.task.world] + effects[cell.arm_name] + rng.normal(0, 0.1) if cell.split == "test" else 0.0
        lost = cell.arm_name == BROKEN and cell.split == "test"
        correct = 0 if lost else round(400 / (1 + np.exp(-odds)))
        folder = output_dir / CELLS_FOLDER / cell.name
        folder.mkdir(parents=True)
        rows = [{"step": 2 * i + 2, "reward": correct / 400 * i / 4, "entropy": 1.0} for i in range(4)]
        (folder / METRICS_NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = {
            "preset": cell.arm.preset,
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
            "accuracy": correct / 400,
            "correct": correct,
            "complete": 0.1 if lost else 0.9,
            "log_odds": odds,
            "reading_log_odds": 8.0,
            "environment": {"commit": "0123456789ab", "code": "abcdef012345", "torch": "2.13.0"},
        }
        (folder / RESULT_NAME).write_text(json.dumps(result))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    study = study_from(changed(preregistered={"tests": TESTS}), folder)
    freeze(study, folder)
    write_synthetic_runs(study, folder, EFFECTS)
    results = load_results(study, folder)
    write_report(study, results, folder / "report.md", folder / "figures")
    return study, results, folder


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of a report's texts: most of its time goes into pictures."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *arguments, **options: None)


class TestVerdicts:
    def test_the_planted_effects_are_found_and_nothing_else(self, planted):
        study, results, _ = planted
        found = {one.name: one for one in verdicts(study, results)}
        assert {name: one.verdict for name, one in found.items()} == FOUND
        assert found["better"].effect.value == pytest.approx(1.0, abs=0.15)
        assert found["order"].effect.value == pytest.approx(1.0, abs=0.1)
        assert found["form"].effect.value == 1.0 == found["form"].effect.high
        assert found["better"].agreeing == found["better"].worlds == 3

    def test_the_report_opens_with_them(self, planted):
        _, _, folder = planted
        text = (folder / "report.md").read_text()
        assert text.split("\n## ")[1].startswith("Verdicts")
        rows = tables_of(text)["Verdicts", ""][0]
        assert [row["verdict"].strip("*") for row in rows] == list(FOUND.values())
        # No other table has p-values.
        others = [
            row
            for place, tables in tables_of(text).items()
            for rows in tables
            for row in rows
            if place[0] != "Verdicts"
        ]
        assert len(others) >= 8 and not [row for row in others if any(name.split()[0] == "p" for name in row)]

    def test_more_tests_ask_for_smaller_p_values(self, planted):
        study, results, folder = planted
        alone = replace(study.preregistered, tests={"better": study.preregistered.tests["better"]})
        both = {one.name: one for one in verdicts(study, results)}
        # The folder's family is larger, so none of this smaller one counts.
        assert verdicts(replace(study, preregistered=alone), results) == []
        assert both["better"].p_adjusted > both["better"].p_value

    @pytest.mark.usefixtures("undrawn")
    @pytest.mark.parametrize(
        "change",
        [
            {"preregistered": {"tests": {**TESTS, "better": {**TEST, "smallest": 0.1}}}},
            {"preregistered": {"tests": {**TESTS, "better": {**TEST, "side": "two"}}}},
            {"experiments": {"main": {**TINY["experiments"]["main"], "seeds": [0, 1, 2, 3]}}},
        ],
    )
    def test_a_test_that_changed_after_the_first_run_is_no_verdict(self, planted, tmp_path, change):
        _, results, folder = planted
        content = changed(preregistered={"tests": TESTS})
        for section, entries in change.items():
            content[section] = {**content[section], **entries}
        study = study_from(content, tmp_path)
        late = changed_tests(study, folder)
        assert "better" in late and "interaction" not in late
        assert "better" not in {one.name for one in verdicts(study, results)}
        write_report(study, results, tmp_path / "report.md", tmp_path / "figures")
        assert "Named or changed after the first run, so no verdict: `better`" in (tmp_path / "report.md").read_text()

    def test_a_folder_without_named_tests_has_no_verdicts(self, planted, tmp_path):
        study, results, _ = planted
        elsewhere = replace(results, output_dir=tmp_path)
        assert verdicts(study, elsewhere) == [] and changed_tests(study, tmp_path) == list(TESTS)
        dropped = replace(study, preregistered=replace(study.preregistered, level=0.1))
        assert changed_tests(dropped, results.output_dir) == list(TESTS)

    def test_the_tests_are_written_once(self, planted, tmp_path):
        study, _, _ = planted
        freeze(study, tmp_path)
        first = (tmp_path / FROZEN_NAME).read_text()
        freeze(replace(study, preregistered=replace(study.preregistered, level=0.5)), tmp_path)
        assert (tmp_path / FROZEN_NAME).read_text() == first

    def test_missing_runs_are_no_verdict(self, planted):
        study, results, _ = planted
        runs = results.runs
        one = (runs["arm"] == "better") & (runs["seed"] == 0) & (runs["world"] == 0) & (runs["task"] == "short")
        found = {v.name: v for v in verdicts(study, replace(results, runs=runs[~one]))}
        assert found["better"].verdict == "cannot tell" and found["better"].reason == "1 runs are missing"
        assert found["form"].verdict == "held"


class TestTables:
    def test_differences_are_within_worlds_and_not_tested(self, planted):
        study, results, _ = planted
        table = comparisons(study, results)[0].table.set_index("arm")
        assert table["difference"].drop("sapo").to_dict() == pytest.approx(
            {"better": 1.0, "equal": 0.0, "sapo_random": -1.0}, abs=0.15
        )
        assert np.isnan(table.loc["sapo", "difference"])
        assert (table["difference_high"] - table["difference_low"]).drop("sapo").max() < 0.5  # levels differ by more
        assert table["lost_form"].to_dict() == {"better": 0, "sapo": 0, "equal": 9, "sapo_random": 0}
        assert not [name for name in table.columns if name.startswith("p_")]

    def test_every_number_is_recomputed(self, planted):
        _, _, folder = planted
        checked = recompute(folder / "study.yaml", folder / "report.md", folder / "figures")
        assert checked["verdicts"] == 6 * len(TESTS) and checked["tuning"] == 3 * 3
        assert checked["experiments"] == 11 * (4 + 2 + 2 + 2)

    @pytest.mark.parametrize("old", ["held", "9 of 9", "1.000"])
    def test_the_recomputation_sees_a_wrong_number(self, planted, tmp_path, old):
        _, _, folder = planted
        text = (folder / "report.md").read_text()
        start = text.index("| claim")
        assert old in text[start:]
        wrong = text[:start] + text[start:].replace(old, "0.123", 1)
        (tmp_path / "report.md").write_text(wrong)
        with pytest.raises((AssertionError, AttributeError)):
            recompute(folder / "study.yaml", tmp_path / "report.md", folder / "figures")

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

    @pytest.mark.usefixtures("undrawn")
    def test_an_unfinished_study_says_what_is_missing(self, planted, tmp_path):
        study, _, folder = planted
        shutil.copytree(folder / CELLS_FOLDER, tmp_path / CELLS_FOLDER)
        (next((tmp_path / CELLS_FOLDER).glob("test-long-world1-better-seed1*")) / RESULT_NAME).unlink()
        results = load_results(study, tmp_path)
        assert len(results.missing) == 1 and "long-world1-better-seed1" in results.missing[0]
        write_report(study, results, tmp_path / "report.md", tmp_path / "figures")
        assert "not finished: 1 runs are missing" in (tmp_path / "report.md").read_text()

    @pytest.mark.usefixtures("undrawn")
    @pytest.mark.parametrize("kept", ["test-short-world0-sapo-seed0", "test-short-world1-better", "test-long"])
    def test_a_report_of_any_part_of_a_study(self, kept, planted, tmp_path):
        study, _, folder = planted
        for cell in (folder / CELLS_FOLDER).iterdir():
            if cell.name.startswith(("tune", kept)):
                shutil.copytree(cell, tmp_path / CELLS_FOLDER / cell.name)
        freeze(study, tmp_path)
        results = load_results(study, tmp_path)
        write_report(study, results, tmp_path / "report.md", tmp_path / "figures")
        assert "not finished" in (tmp_path / "report.md").read_text()

    @pytest.mark.usefixtures("undrawn")
    def test_runs_of_different_code_are_named(self, planted, tmp_path):
        study, results, folder = planted
        assert "all runs were made by the same code" in (folder / "report.md").read_text()
        runs = results.runs.copy()
        runs["environment"] = [{"code": "one"}, *[{"code": "two"}] * (len(runs) - 1)]
        write_report(study, replace(results, runs=runs), tmp_path / "report.md", tmp_path / "figures")
        text = (tmp_path / "report.md").read_text()
        assert "- code: one, two" in text and "**The runs differ in: code.**" in text

    @pytest.mark.usefixtures("undrawn")
    def test_diverged_runs_are_named_and_their_curve_goes_on(self, planted, tmp_path):
        study, results, _ = planted
        runs = results.runs[results.runs["task"] == "short"].copy()
        runs["failed"] = [None if arm != "equal" else "not finite" for arm in runs["arm"]]
        write_report(study, replace(results, runs=runs), tmp_path / "report.md", tmp_path / "figures")
        assert (
            "counted as accuracy 0 (arm, task, world, seed): `equal` (short, 0, 0)"
            in (tmp_path / "report.md").read_text()
        )
        one = runs[(runs["arm"] == "equal") & (runs["seed"] == 0) & (runs["world"] == 0)]
        folder = tmp_path / "short"
        folder.mkdir()
        (folder / METRICS_NAME).write_text(json.dumps({"step": 2, "reward": 0.5}) + "\n")
        mixed = pd.concat([one.assign(folder=str(folder)), runs[runs["arm"] == "sapo"]])
        curves = training_curves(mixed, {"reward": "accuracy"})
        assert curves.loc[curves["arm"] == "equal", "accuracy"].tolist() == [0.5, 0, 0, 0]

    def test_a_result_of_another_version_and_a_cut_log(self, planted, tmp_path, capsys, caplog):
        study, _, folder = planted
        shutil.copytree(folder / CELLS_FOLDER, tmp_path / CELLS_FOLDER)
        one = next((tmp_path / CELLS_FOLDER).glob("test-long-world1-better-seed1*"))
        content = json.loads((one / RESULT_NAME).read_text())
        run = pd.Series({**content, "folder": str(one)})
        (one / METRICS_NAME).write_text((one / METRICS_NAME).read_text()[:-9])
        assert metrics_of(run)["step"].tolist() == [2, 4, 6] and "the last line is cut" in caplog.text
        (one / METRICS_NAME).write_text("{}\n[]\n")
        with pytest.raises(ValueError, match=f"{one / METRICS_NAME}, line 2: the content must be an object"):
            metrics_of(run)
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

    @pytest.mark.usefixtures("undrawn")
    def test_texts_of_a_file_are_written_as_texts(self, planted, tmp_path):
        study, results, _ = planted
        runs = results.runs.copy()
        runs["environment"] = [{"torch": "<img src=x>|"}] * len(runs)
        write_report(study, replace(results, runs=runs), tmp_path / "report.md", tmp_path / "figures")
        assert r"\<img src=x\>\|" in (tmp_path / "report.md").read_text()

    def test_nothing_to_report(self, tmp_path):
        with pytest.raises(ValueError, match="6 of 6 tuning runs are not finished"):
            load_results(study_from(TINY, tmp_path), tmp_path)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 11])
def test_a_panel_has_at_most_five_curves(count):
    arms = ["sapo", *(f"arm{i}" for i in range(count - 1))]
    groups = groups_of(arms, "sapo")
    assert max(map(len, groups)) <= 5 and {arm for group in groups for arm in group} == set(arms)
    assert [group[0] for group in groups] == ["sapo"] * len(groups)
