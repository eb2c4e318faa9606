"""Recorded files: reading returns the written rows, with the columns that the package declares."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from sapo_trl.analysis import read_responses
from sapo_trl.embedded import build_tokenizer
from sapo_trl.recordings.columns import RATIO_COLUMNS, RESPONSE_COLUMNS, REWARD_COLUMNS, SETTINGS_FILE, file_name
from sapo_trl.recordings.run import read_recording
from sapo_trl.recordings.tables import read_frame
from sapo_trl.recordings.writing import RatioRecord, segmented_responses, write_rows, write_settings
from sapo_trl.rollouts.types import RewardParts, SegmentedRollout
from sapo_trl.segments import Segments
from tests.viewer.recorded_runs import SETTINGS


# Two responses: three loss tokens behind one of a tool, and two loss tokens; -1 is outside the segments.
SEGMENT_IDS = [[-1, 0, 0, 1], [0, 1, -1, -1]]
PRESENT = [[1, 1, 1, 1], [1, 1, 0, 0]]
LENGTHS = (3, 2)
NUMBERS = ("logps", "entropies", "values", "advantages", "returns")


@pytest.fixture(scope="module")
def rollout() -> SegmentedRollout:
    tokenizer = build_tokenizer()
    segments = Segments(torch.tensor(SEGMENT_IDS))
    grid = torch.arange(8.0).view(2, 4)
    return SegmentedRollout(
        segments=segments,
        completion_ids=torch.tensor(tokenizer("abcd")["input_ids"]).repeat(2, 1),
        prompt_ids=torch.tensor(tokenizer("xy")["input_ids"]).repeat(2, 1),
        prompt_mask=torch.ones(2, 2, dtype=torch.long),
        **{name: grid + 10 * place for place, name in enumerate(NUMBERS)},
        token_rewards=torch.zeros(2, 4),
        rewards=torch.tensor([0.5, torch.nan]),
        tokenizer=tokenizer,
        mode="train",
        completion_mask=torch.tensor(PRESENT),
        visual_dependency=grid + 50,
        policy_mask=torch.tensor([[False, True, False, True], [False, True, False, False]]),
        raw_advantages=grid + 60,
        td_errors=grid + 70,
        value_states=segments.is_first,
        reward_parts=RewardParts(["right", "short"], [0.5, 2.0], torch.tensor([[1.0, 0.0], [torch.nan, torch.nan]])),
        answers=[42, None],
    )


@pytest.fixture(params=["parquet", "json"])
def folder(request, rollout, tmp_path):
    """The files of this rollout, and of the log-ratios of an update."""
    write_rows(tmp_path / file_name("segments", 3, 1, request.param), segmented_responses(rollout, step=3))
    ratios = RatioRecord(tmp_path / file_name("ratios", 3, 1, request.param), rollout.segments.mask)
    ratios.add([1, 0], torch.arange(8.0).view(2, 4))
    assert ratios.complete
    write_rows(ratios.path, ratios.rows())
    return tmp_path


def test_files_have_the_declared_columns(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert [name.split(".")[0] for name in names] == ["ratios_000003_001", "segments_000003_001"]
    ratios, responses = (read_frame(folder / name, {})[0] for name in names)
    assert set(ratios) == set(RATIO_COLUMNS)
    assert set(responses) == set(RESPONSE_COLUMNS) - {"images", "corrupted_images"}  # a text prompt has none


def test_all_is_read_back(folder):
    read, recording = read_responses(folder, NUMBERS), read_recording(folder)
    assert recording.responses["tokens"].tolist() == [["b", "c", "d"], ["a", "b"]]
    assert recording.responses["segment_ids"].tolist() == [[0, 0, 1], [0, 1]]
    assert recording.responses["masked_tokens"].tolist() == [["a"], []]
    assert recording.responses["masked_positions"].tolist() == [[0], []]
    assert recording.responses["prompt"].tolist() == ["xy", "xy"]
    for table in (read, recording.responses):
        assert table[["step", "process", "response"]].values.tolist() == [[3, 1, 0], [3, 1, 1]]
        assert table["reward"].tolist() == pytest.approx([0.5, np.nan], nan_ok=True)
        for place, name in enumerate(NUMBERS):
            expected = [[1, 2, 3], [4, 5]]
            assert [list(row) for row in table[name]] == [[x + 10 * place for x in row] for row in expected]
    assert [list(row) for row in recording.responses["visual_dependency"]] == [[51, 52, 53], [54, 55]]
    assert [list(row) for row in recording.responses["policy_mask"]] == [[1, 0, 1], [0, 1]]
    assert [list(row) for row in recording.responses["raw_advantages"]] == [[61, 62, 63], [64, 65]]
    assert [list(row) for row in recording.responses["td_errors"]] == [[71, 72, 73], [74, 75]]
    assert [list(row) for row in recording.responses["value_states"]] == [[1, 0, 1], [1, 1]]
    assert recording.responses["answer"].tolist() == ["42", None]
    assert recording.responses["reward_names"].tolist() == [["right", "short"]] * 2
    assert recording.responses["reward_weights"].tolist() == [[0.5, 2.0]] * 2
    first, second = recording.responses["reward_values"]
    assert first == [1.0, 0.0] and all(pd.isna(value) for value in second) and len(second) == 2
    # Row 1 of the rollout was first in the micro-batch.
    assert [list(row) for row in recording.responses["log_ratios"]] == [[5, 6, 7], [0, 1]]


def test_a_run_that_asks_for_neither_sight_nor_a_mask(rollout, tmp_path):
    """Such columns are left out. Reading such a file, or one of an earlier version, gives unknown values."""
    absent = ("visual_dependency", "policy_mask", "td_errors", "value_states", "raw_advantages")
    plain = replace(rollout, **dict.fromkeys([*absent, "reward_parts", "answers"]))
    rows = segmented_responses(replace(plain, policy_mask=rollout.segments.mask), step=3)
    assert not {*absent, *REWARD_COLUMNS, "answer"} & rows[0].keys()
    write_rows(tmp_path / file_name("segments", 3, 1, "parquet"), rows)
    table = read_recording(tmp_path).responses
    assert table["answer"].tolist() == [None, None] and table["reward_names"].tolist() == [[], []]
    assert read_recording(tmp_path).settings is None
    for name in absent:
        assert [len(row) for row in table[name]] == list(LENGTHS)
        assert all(np.isnan(row).all() for row in table[name])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("[]", "must be an object"),
        ('{"preset": 3}', "`preset` must be a text"),
        (json.dumps({**SETTINGS, "differences": None}), "`differences` must be an object"),
        (json.dumps({name: x for name, x in SETTINGS.items() if name != "critic"}), "`critic` is missing"),
        ("{", "not JSON"),
    ],
)
def test_broken_settings_are_named(folder, content, error):
    (folder / SETTINGS_FILE).write_text(content)
    with pytest.raises(ValueError, match=error) as raised:
        read_recording(folder)
    assert "run.json" in str(raised.value)


def test_settings_are_read_back(folder):
    write_settings(folder, SETTINGS)
    assert read_recording(folder).settings == SETTINGS


def test_lists_of_reward_functions_that_do_not_fit_are_an_error(rollout, tmp_path):
    rows = segmented_responses(rollout, step=3)
    rows[1]["reward_weights"] = [1.0]
    write_rows(tmp_path / file_name("segments", 3, 1, "json"), rows)
    with pytest.raises(ValueError, match="response 1 must have one entry per reward function"):
        read_recording(tmp_path)


def test_a_missing_column_of_values_is_named(folder):
    columns = {"step": [3], "response": [0], "segment": [0], "token": [1], "value": [0.0], "monte_carlo_value": [1.0]}
    pd.DataFrame(columns).to_parquet(folder / "values_000003_001.parquet")
    with pytest.raises(ValueError, match="values_000003_001.parquet: column `standard_error` is missing"):
        read_recording(folder)
