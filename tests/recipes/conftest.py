"""The warm-started model of the picture task, loaded once a file."""

import pytest
from transformers import AutoModelForImageTextToText

from sapo_trl.embedded import load_processor


@pytest.fixture(scope="module")
def warm_model(warm_folder):
    return AutoModelForImageTextToText.from_pretrained(warm_folder), load_processor(warm_folder)
