"""The runs of a study: their settings, their names, the choice of settings, and the estimate of their time."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from sapo_trl.study import cells
from sapo_trl.study.cells import RESULT_NAME, Cell, Choice, comparison_cells, tuning_cells
from sapo_trl.study.code import NEVER_LOADED
from sapo_trl.study.run_cell import cell_config
from sapo_trl.study.runner import CELLS_FOLDER, estimate, run_study, unused_runs
from sapo_trl.study.tuning import chosen_settings

from .test_study import ROOT, TINY, changed, study_from


CHOSEN = {"sapo": Choice(0.001, {}), "better": Choice(0.002, {}), "equal": Choice(0.001, {})}


class TestCells:
    def test_arms_differ_in_what_is_compared_and_in_nothing_else(self, tmp_path):
        study = study_from(TINY, tmp_path)
        configs = [cell_config(cell, tmp_path) for cell in tuning_cells(study)]
        shared = ("max_steps", "seed", "beta", "critic_learning_rate", "generation_batch_size", "temperature")
        for name in shared:
            assert len({getattr(config, name) for config in configs}) == 1, name

    def test_tuning_is_equal_and_apart_from_the_comparison(self, tmp_path):
        study = study_from(changed(tuning={"worlds": [7, 8]}), tmp_path)
        tuning = tuning_cells(study)
        assert Counter((c.arm_name, c.learning_rate, c.task.world) for c in tuning) == Counter(
            (arm, rate, world) for arm in ("sapo", "better", "equal") for rate in (0.001, 0.002) for world in (7, 8)
        )
        assert {c.split for c in tuning} == {"tune"} and {c.seed for c in tuning} == {100}

    def test_comparisons_have_every_world_with_every_seed_once(self, tmp_path):
        compared = comparison_cells(study_from(TINY, tmp_path), CHOSEN)
        assert {c.split for c in compared} == {"test"}
        assert {c.learning_rate for c in compared if c.arm_name == "sapo_random"} == {0.001}
        # 4 arms with 3 worlds and 3 seeds on the short task; both experiments share the others' runs there.
        places = Counter((c.task_name, c.task.world, c.seed, c.arm_name) for c in compared)
        assert set(places.values()) == {1} and len(places) == len({c.name for c in compared}) == 4 * 9 + 2 * 4
        policies = {(c.task_name, c.task.world): c.policy for c in compared}
        assert len(set(policies.values())) == len(policies) == 5

    def test_choices_are_tuned_with_every_rate_and_go_to_variants(self, tmp_path):
        choices = [{"lam": 0.5}, {"lam": 0.6}]
        content = changed(arms={"sapo": {"preset": "sapo", "choices": choices}})
        study = study_from(content, tmp_path)
        tuned = [c for c in tuning_cells(study) if c.arm_name == "sapo"]
        assert sorted((c.learning_rate, c.arm.settings["lam"]) for c in tuned) == [
            (rate, lam) for rate in (0.001, 0.002) for lam in (0.5, 0.6)
        ]
        results = [
            (
                c,
                {
                    "accuracy": 0.9 if c.arm.settings.get("lam") == 0.6 else 0.1,
                    "log_odds": 0.0,
                    "complete": 1.0,
                    "seconds": 1,
                },
            )
            for c in tuning_cells(study)
        ]
        chosen = chosen_settings(results, {"sapo": choices})
        assert chosen["sapo"] == Choice(0.001, {"lam": 0.6})
        compared = comparison_cells(study, chosen)
        lams = {c.arm_name: cell_config(c, tmp_path).lam for c in compared}
        assert lams["sapo"] == lams["sapo_random"] == 0.6 != lams["better"]

    def test_a_fixed_rate_is_not_tuned(self, tmp_path):
        study = study_from(changed(arms={"equal": {"preset": "grpo", "learning_rate": 0.5}}), tmp_path)
        assert "equal" not in {c.arm_name for c in tuning_cells(study)}
        compared = comparison_cells(study, {name: CHOSEN[name] for name in ("sapo", "better")})
        assert {c.learning_rate for c in compared if c.arm_name == "equal"} == {0.5}

    def test_adapters_are_the_study_s_unless_an_arm_has_its_own(self, tmp_path):
        full = changed(lora_rank=8, arms={"equal": {"preset": "grpo", "lora_rank": 0}})
        ranks = {cell.arm_name: cell.lora_rank for cell in tuning_cells(study_from(full, tmp_path))}
        assert ranks == {"sapo": 8, "better": 8, "equal": 0}

    def test_a_cell_survives_its_file(self, tmp_path):
        records = {"seeds": [0, 1], "arms": ["sapo", "better"], "valued_arms": ["sapo"], "continuations": 3}
        compared = comparison_cells(study_from({**TINY, "records": records}, tmp_path), CHOSEN)
        recorded = {(c.arm_name, c.seed): c.records.continuations for c in compared if c.records is not None}
        assert recorded == {("sapo", 0): 3, ("sapo", 1): 3, ("better", 0): 0, ("better", 1): 0}
        for cell in compared:
            assert Cell.from_json(cell.to_json()) == cell

    def test_names_change_with_what_decides_a_run(self, tmp_path):
        def names(content: dict) -> set[str]:
            return {cell.name for cell in tuning_cells(study_from(content, tmp_path))}

        assert names(TINY) == names(changed(name="Another title")) == names(changed(seconds={"other": 3}))
        assert not names(TINY) & names(changed(budget={"rollouts": 5}))
        assert not names(TINY) & names(changed(lora_rank=4))
        assert not names(TINY) & names(changed(settings={"beta": 0.1}))
        assert not names(TINY) & names(changed(tuning={"worlds": [1]}))

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
        others = {"log_odds": 0.0, "complete": 1.0, "seconds": 1.0}
        results = [
            (c, {"accuracy": accuracies.get((c.arm_name, c.learning_rate, c.seed), 0.5), **others})
            for c in tuning_cells(study)
        ]
        # sapo: 0.55 beats 0.5; the others are level.
        assert chosen_settings(results, {}) == dict.fromkeys(("sapo", "better", "equal"), Choice(0.001, {}))


def test_the_estimate_counts_missing_runs_and_warm_starts(tmp_path):
    study = study_from(changed(seconds={"other": 30, "better": 90, "warm_start": 360}), tmp_path)
    cells_dir = tmp_path / "cells"
    cells_dir.mkdir()
    runs = [*tuning_cells(study), *comparison_cells(study, CHOSEN)]
    ours = Counter(cell.arm_name == "better" for cell in runs)
    seconds = 30 * ours[False] + 90 * ours[True] + 360 * 5
    said = estimate(study, runs, cells_dir, tmp_path / "cache", 2)
    assert said.startswith(f"{len(runs)} runs, 0 of them finished, and 5 warm starts to make.")
    assert f"{seconds / 3600:.1f} core-hours, {seconds / 7200:.1f} hours here" in said
    # Also with another tuned rate: until the tuning is finished, the rates of comparisons are a guess.
    other_rates = comparison_cells(study, dict.fromkeys(CHOSEN, Choice(0.002, {})))
    for cell in other_rates:
        (cells_dir / cell.name).mkdir()
        (cells_dir / cell.name / RESULT_NAME).write_text(json.dumps({}))
    assert f", {len(other_rates)} of them finished, and 1 warm starts" in estimate(
        study, runs, cells_dir, tmp_path / "cache", 2
    )


@pytest.mark.slow
def test_the_code_s_fingerprint_leaves_out_only_files_that_no_run_loads():
    script = (
        "import sys, sapo_trl.study.run_cell\n"
        "print(*[m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)], sep='\\n')"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    package = str(ROOT / "sapo_trl") + "/"
    loaded = {path.removeprefix(package) for path in output.splitlines() if path.startswith(package)}
    assert "study/run_cell.py" in loaded and len(loaded) > 50
    assert [name for name in sorted(loaded) if name.startswith(NEVER_LOADED)] == []
    assert [name for name in NEVER_LOADED if not (ROOT / "sapo_trl" / name).exists()] == []
