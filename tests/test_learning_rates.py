"""The warning about a learning rate that was changed for the policy alone."""

import logging

import pytest

from sapo_trl import SAPOConfig


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"learning_rate": 1e-4}, True),
        ({"learning_rate": 1e-4, "critic": "shared"}, True),
        ({"learning_rate": 1e-4, "critic_learning_rate": 2e-6}, False),  # the user's own choice
        ({"learning_rate": 1e-4, "critic": "ladder"}, False),
        ({"learning_rate": 1e-4, "critic": "none"}, False),
        ({"critic_learning_rate": 1e-3}, False),
        ({}, False),
    ],
)
def test_one_changed_rate(settings, warns, caplog, tmp_path):
    with caplog.at_level(logging.WARNING, logger="sapo_trl.config"):
        SAPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    messages = [record.getMessage() for record in caplog.records if record.name == "sapo_trl.config"]
    assert len(messages) == warns
    if warns:
        assert "learning_rate=0.0001" in messages[0] and "critic_learning_rate=2e-06" in messages[0]
