"""The name of a configuration's algorithm, and the settings that differ from it."""

import pytest

from sapo_trl import PRESETS, SAPOConfig
from sapo_trl.closest_preset import DEFAULTS, closest_preset, other_settings


CPU = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_known_by_its_settings(preset):
    found = closest_preset(SAPOConfig.from_preset(preset, **CPU))
    assert found.differences == {}
    # Two names may stand for the same settings.
    assert {**PRESETS[found.name].settings, "num_generations": 0} == {**PRESETS[preset].settings, "num_generations": 0}


def test_what_is_near_a_preset_is_told_with_the_difference():
    assert closest_preset(SAPOConfig(**CPU)).name == DEFAULTS
    changed = closest_preset(SAPOConfig.from_preset("vc_ppo", lam=0.5, **CPU))
    assert (changed.name, changed.differences) == ("vc_ppo", {"lam": 0.5})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_alone_has_no_other_settings(preset):
    assert other_settings(SAPOConfig.from_preset(preset, **CPU), preset) == {}


def test_other_settings_that_were_changed():
    """Neither those of the algorithm, nor folders, accounts and the machine."""
    changed = {"learning_rate": 1e-4, "num_generations": 16, "per_device_train_batch_size": 16, "gamma": 0.9}
    private = {"run_name": "mine", "hub_model_id": "me/mine", "hub_token": "secret", "seed": 3}
    args = SAPOConfig.from_preset("grpo", lam=0.5, **changed, **private, **CPU)
    assert other_settings(args, "grpo") == {**changed, "seed": 3}
    assert other_settings(SAPOConfig(**CPU), DEFAULTS) == {}
