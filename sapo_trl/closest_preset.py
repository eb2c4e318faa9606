"""Names the algorithm of a configuration: the preset that it is, or is nearest to, and the settings that differ."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from .config import SAPOConfig, default_settings
from .presets import AXES, PRESETS, RUN_SETTINGS, preset_settings


DEFAULTS = "SAPOConfig's defaults"
DEFAULTS_SUMMARY = "Segment-Aligned Policy Optimization, with the stabilisers of its official code"

# Inherited settings that a reader of a run asks for. Others name folders and accounts, which are nobody's business, or
# follow from the machine.
_INHERITED = (
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_iterations",
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "mask_truncated_completions",
    "multi_objective_aggregation",
    "use_vllm",
    "seed",
)
# Its default follows from other settings.
_DERIVED_DEFAULTS = {"num_mini_batches": 4}


@dataclass(frozen=True)
class ClosestPreset:
    """
    The algorithm of a configuration, by the preset that it shares most with.

    Args:
        name (`str`): a preset, or [`DEFAULTS`].
        differences (`dict[str, Any]`): the configuration's algorithm settings that differ from the preset's.
    """

    name: str
    differences: dict[str, Any]


def closest_preset(args: SAPOConfig) -> ClosestPreset:
    """
    The preset that a configuration is, or is nearest to. The number of responses per prompt and the critic's learning
    rate do not count.
    """
    ignored = RUN_SETTINGS | {"num_generations"}
    defaults = {name: default for name, default in default_settings().items() if name not in ignored}
    candidates = {DEFAULTS: defaults}
    for name in PRESETS:
        settings = preset_settings(name)
        candidates[name] = {setting: settings.get(setting, default) for setting, default in defaults.items()}
    found = [
        ClosestPreset(name, {s: getattr(args, s) for s, value in settings.items() if getattr(args, s) != value})
        for name, settings in candidates.items()
    ]
    return min(found, key=lambda candidate: len(candidate.differences))


def other_settings(args: SAPOConfig, preset: str) -> dict[str, Any]:
    """
    The settings outside of a preset's algorithm that differ from their defaults, or from the preset's values.

    Args:
        args ([`SAPOConfig`]): settings of a run.
        preset (`str`): a preset, or [`DEFAULTS`].

    Returns:
        `dict[str, Any]`: none of them names a folder or an account.
    """
    algorithm = {name for names in AXES.values() for name in names} - RUN_SETTINGS - {"num_generations"}
    own = [name for name in SAPOConfig.__annotations__ if name not in algorithm]
    known = {setting.name: setting.default for setting in fields(SAPOConfig) if setting.default is not MISSING}
    defaults = {**known, **_DERIVED_DEFAULTS, **default_settings(), "num_generations": known["num_generations"]}
    if preset != DEFAULTS:
        defaults |= preset_settings(preset)
    names = dict.fromkeys([*own, "num_generations", *_INHERITED])
    return {name: getattr(args, name) for name in names if name in known and getattr(args, name) != defaults[name]}
