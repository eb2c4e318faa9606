"""Rows that are asked for again: read once, and the same as if they had been read each time."""

import copy
import io

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from sapo_trl.trainer.trl.repeated_rows import RepeatedRows
from tests.testing_utils import sapo_trainer


def pictures(formats: list[str]) -> Dataset:
    rng, rows = np.random.default_rng(0), []
    for number, file_format in enumerate(formats):
        file = io.BytesIO()
        picture = PILImage.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        (picture.quantize(16) if file_format == "GIF" else picture).save(file, format=file_format)
        rows.append({"prompt": [{"role": "user", "content": f"{number}"}], "image": {"bytes": file.getvalue()}})
    features = Features({"prompt": [{"role": Value("string"), "content": Value("string")}], "image": Image()})
    return Dataset.from_list(rows, features=features)


class Counted:
    """A data set that counts which rows are read."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.read = dataset, []

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, indices):
        self.read += indices
        return self.dataset.__getitems__(indices)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=6))
def test_rows_are_what_they_are_when_read_each_time(requests):
    dataset = pictures(["PNG", "JPEG", "GIF", "BMP"])
    counted, repeats = Counted(dataset), 3
    repeated = RepeatedRows(counted, repeats)
    for request in requests:
        expected = dataset.__getitems__(request)
        counted.read.clear()
        found = repeated.__getitems__(request)
        for _ in range(repeats - 1):
            assert [id(row) for row in repeated.__getitems__(request)] == [id(row) for row in found]
        assert sorted(counted.read) == sorted(set(request))
        assert [row["prompt"] for row in found] == [row["prompt"] for row in expected]
        for one, other in zip(found, expected, strict=True):
            assert one["image"].mode == other["image"].mode and one["image"].tobytes() == other["image"].tobytes()


def test_what_is_done_to_a_row_stays_with_it():
    repeated = RepeatedRows(pictures(["PNG", "JPEG"]), repeats=2)
    one, other = repeated.__getitems__([1, 1])
    untouched = copy.deepcopy(other)
    one["image"].thumbnail((2, 2))
    one["prompt"].append("more")
    repeated.__getitems__([1, 1])
    # Of the same rollout, and of the next one, whose rows are the same.
    for row in (other, *repeated.__getitems__([1, 1])):
        assert row["prompt"] == untouched["prompt"]
        assert row["image"].size == untouched["image"].size and row["image"].format == "JPEG"


def test_random_transforms_are_drawn_for_each_rollout():
    drawn = iter(range(100))
    dataset = pictures(["PNG", "JPEG"]).with_transform(lambda rows: {"number": [next(drawn) for _ in rows["image"]]})
    repeated = RepeatedRows(dataset, repeats=2)
    numbers = [[row["number"] for row in repeated.__getitems__(request)] for request in ([0, 1],) * 4 + ([1, 0],)]
    assert numbers == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5]]


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_a_rollout_reads_each_of_its_prompts_once(family, tmp_path, monkeypatch):
    """Two rollouts of four prompts, two responses to each, four micro-batches."""
    read = []
    fetch = Dataset.__getitems__
    monkeypatch.setattr(Dataset, "__getitems__", lambda self, indices: read.extend(indices) or fetch(self, indices))
    trainer = sapo_trainer(
        family,
        tmp_path,
        critic="none",
        advantage_estimator="batch",
        num_generations=2,
        gradient_accumulation_steps=2,
        max_steps=4,
    )
    read.clear()
    trainer.train()
    assert sorted(read) == list(range(8))
    assert isinstance(trainer.train_dataset, Dataset)
