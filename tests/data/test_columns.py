"""The columns in which a row of TRL's form has its images."""

import pytest

from sapo_trl.data.columns import image_column, row_images


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1 + 1?"}, []),
        ({"images": ["a", "b"]}, ["a", "b"]),
        ({"images": []}, []),
        ({"images": None}, []),
        ({"image": "a"}, ["a"]),
        ({"image": None}, []),
        ({"images": ["a"], "image": None}, ["a"]),
        ({"images": ["a"], "image": "b"}, ["a"]),
        ({"images": None, "image": "b"}, ["b"]),
    ],
)
def test_images_of_a_row(row, expected):
    assert row_images(row) == expected


def test_the_column_of_a_data_set():
    found = [image_column(names) for names in (["prompt"], ["image"], ["image", "images"], ["images", "prompt"])]
    assert found == [None, "image", "images", "images"]
