"""The log of loading a critic: silent on a policy's head, but not on weights that are missing."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from sapo_trl.critic.value_head import SegmentValueHead
from tests.testing_utils import FAMILIES


@pytest.fixture
def policy_folder(tokenizer, tmp_path):
    FAMILIES["qwen2"](tokenizer).build_model().save_pretrained(tmp_path)
    return tmp_path


def test_the_head_of_the_policy_is_not_reported(policy_folder, caplog):
    saved = load_file(policy_folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        critic = SegmentValueHead.from_pretrained(policy_folder)
    assert "lm_head.weight" in saved and "LOAD REPORT" not in caplog.text
    assert torch.equal(critic.backbone.embed_tokens.weight, saved["model.embed_tokens.weight"])


def test_missing_weights_are_reported(policy_folder, caplog):
    saved = load_file(policy_folder / "model.safetensors")
    missing = next(name for name in saved if name.endswith("mlp.up_proj.weight"))
    del saved[missing]
    save_file(saved, policy_folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        SegmentValueHead.from_pretrained(policy_folder)
    assert "LOAD REPORT" in caplog.text and missing.removeprefix("model.") in caplog.text
