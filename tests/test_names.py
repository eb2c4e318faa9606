"""The name that a user meant."""

import pytest

from sapo_trl.names import nearest_name


@pytest.mark.parametrize(
    ("mistyped", "known", "meant"),
    [
        ("critic_lr", ["critic_lam", "critic_learning_rate", "critic"], "critic_learning_rate"),
        ("lr", ["lam", "learning_rate"], "learning_rate"),
        ("saop", ["sao", "sapo", "sapo_step"], "sapo"),
        ("sapoo", ["sao", "sapo", "sapo_step"], "sapo"),
    ],
)
def test_the_nearest_name(mistyped, known, meant):
    assert nearest_name(mistyped, known) == f" Did you mean `{meant}`?"


def test_nothing_similar_is_no_guess():
    assert nearest_name("zebra", ["critic_lam", "critic"]) == ""
