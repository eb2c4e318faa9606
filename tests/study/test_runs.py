"""Real runs, as small as they can be: their measurements, their recordings, and a report that can be recomputed."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sapo_trl.study.code import code_fingerprint
from sapo_trl.study.credit import CREDIT_NAME, SHOWN_PROBLEMS
from sapo_trl.study.credit_figure import credit_tables
from sapo_trl.study.recordings import RUN, read_recordings
from sapo_trl.study.report import write_report
from sapo_trl.study.results import StudyResults, load_results
from sapo_trl.study.run_cell import RESPONSES_FOLDER

from .micro import MICRO, run_here, write_study
from .recompute import recompute


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("micro")
    study = write_study(folder)
    run_here(study, folder, folder / "cache")
    results = load_results(study, folder)
    write_report(study, results, folder / "report.md", folder / "figures")
    return study, results, folder


def folder_of(results: StudyResults, arm: str, measure: str = "accuracy") -> Path:
    runs = results.runs
    return Path(runs.loc[(runs["arm"] == arm) & (runs["measure"] == measure), "folder"].iloc[0])


def test_every_run_has_its_measures_and_names_its_code(finished):
    _, results, _ = finished
    runs = results.runs[results.runs["measure"] == "accuracy"]
    assert len(runs) == 2 * 2 * 2 + 3 and results.missing == []
    assert np.isfinite(runs[["log_odds", "reading_log_odds"]].to_numpy(dtype=float)).all()
    assert (runs["correct"] == (runs["accuracy"] * MICRO["budget"]["test_problems"]).round()).all()
    assert {environment["code"] for environment in results.runs["environment"]} == {code_fingerprint()}


def test_worlds_have_policies_of_their_own(finished):
    _, results, _ = finished
    runs = results.runs[(results.runs["arm"] == "sapo") & (results.runs["measure"] == "accuracy")]
    assert runs["log_odds"].nunique() == 4


def test_each_number_of_the_report_is_recomputed_from_the_published_files(finished):
    _, _, folder = finished
    checked = recompute(folder / "study.yaml", folder / "report.md", folder / "figures")
    assert checked["verdicts"] == 6 * 2 and checked["credit"] == 1 + 2 * 3
    assert checked["lift"] == 2 * 3  # of two critics, one of them with Monte-Carlo values
    assert min(checked[name] for name in ("experiments", "lift", "borders", "ratios", "tuning")) >= 2


def test_recordings_of_every_arm_are_published_and_small(finished):
    _, _, folder = finished
    recordings = read_recordings(folder / "figures")
    recorded = Counter(recordings.responses[list(RUN)].itertuples(index=False, name=None))
    assert recorded == {
        **{(arm, "short", world, 0): 2 * 16 for arm in ("sapo", "reinforce") for world in (0, 1)},
        **{(arm, "short", 0, 0): 2 * 16 for arm in ("vineppo", "pairs", "centred")},
    }
    assert set(recordings.values["arm"]) == {"sapo"}
    assert len(recordings.logs) == 2 * 11
    tokens = sum(map(len, recordings.responses["tokens"]))
    assert (folder / "figures" / "responses.parquet").stat().st_size < 20 * tokens + 20_000


def test_credit_is_of_the_same_responses(finished):
    study, results, folder = finished
    tables = credit_tables(results, study.experiments["credit"].arms)
    assert list(tables) == ["vineppo", "sapo", "reinforce"]
    texts = {arm: ["".join(row) for row in table["tokens"]] for arm, table in tables.items()}
    assert texts["vineppo"] == texts["sapo"] == texts["reinforce"] and len(texts["sapo"]) == SHOWN_PROBLEMS
    for table in tables.values():
        np.testing.assert_array_equal(table["reward"], tables["sapo"]["reward"])
        assert [len(row) for row in table["exact"]] == [len(row) for row in table["tokens"]]
        np.testing.assert_allclose(np.concatenate(list(table["exact"])), np.concatenate(list(tables["sapo"]["exact"])))
    # Without credit inside a response its tokens have one advantage, which rises with the reward.
    flat = tables["reinforce"][[len(row) > 0 for row in tables["reinforce"]["tokens"]]]
    assert max(np.ptp(row) for row in flat["advantages"]) < 1e-6
    of_reward = flat.assign(first=[row[0] for row in flat["advantages"]]).groupby("reward")["first"].mean()
    assert of_reward.is_monotonic_increasing
    assert max(np.ptp(row) for row in tables["sapo"]["advantages"] if len(row)) > 1e-3
    assert (folder / "figures" / "credit.png").stat().st_size > 20_000


def test_credit_of_other_responses_is_refused(finished, tmp_path):
    study, results, _ = finished
    runs = results.runs.copy()
    source = folder_of(results, "sapo", "credit")
    table = pd.read_parquet(source / CREDIT_NAME)
    table["tokens"] = [["other"] for _ in range(len(table))]
    table.to_parquet(tmp_path / CREDIT_NAME)
    runs.loc[runs["folder"] == str(source), "folder"] = str(tmp_path)
    changed = StudyResults(runs, results.tuning, results.chosen, results.missing, results.output_dir)
    with pytest.raises(ValueError, match="`sapo` and of `vineppo` is of different responses"):
        credit_tables(changed, study.experiments["credit"].arms)


def recorded_responses(results: StudyResults, arm: str) -> pd.DataFrame:
    return pd.concat(map(pd.read_parquet, sorted((folder_of(results, arm) / RESPONSES_FOLDER).glob("segments_*"))))


def test_centred_advantages_have_no_mean_at_any_position(finished):
    _, results, _ = finished
    for centred, arm in ((True, "centred"), (False, "sapo")):
        rows = recorded_responses(results, arm)
        rows = rows[rows["step"] == rows["step"].min()]["advantages"]
        padded = pd.DataFrame([pd.Series(row) for row in rows])
        assert len(rows) == 16 and (padded.mean().abs().max() < 1e-5) == centred


def test_pairs_of_lines_are_segments(finished):
    _, results, _ = finished
    found = Counter()
    for arm, lines in (("vineppo", 1), ("pairs", 2)):
        rows = recorded_responses(results, arm)
        for tokens, ids in zip(rows["tokens"], rows["segment_ids"], strict=True):
            breaks = [i for i, token in enumerate(tokens) if token == "\n"]
            cuts = np.flatnonzero(np.diff(ids)).tolist()
            assert cuts == [i for i in breaks[lines - 1 :: lines] if i < len(tokens) - 1]
            found[arm] += len(cuts)
    assert found["vineppo"] > found["pairs"]
