"""The model card: TRL's card, completed by algorithm, settings and the last logged values."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard

from ..closest_preset import DEFAULTS, DEFAULTS_SUMMARY, closest_preset
from ..config import SAPOConfig
from ..metric_names import with_present_names
from ..presets import PRESETS
from ..segmentation import Segmenter


# The settings that a reader asks for first.
_SETTINGS = (
    "segmentation",
    "top_percent",
    "critic",
    "value_state",
    "gamma",
    "lam",
    "epsilon",
    "epsilon_high",
    "delta",
    "beta",
    "learning_rate",
    "critic_learning_rate",
    "num_mini_batches",
    "num_generations",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
    "temperature",
    "seed",
)
_RESULTS = (
    r"(eval_)?reward|(eval_)?rewards/.+/mean|(eval_)?entropy|(eval_)?completions/mean_length|segments/count"
    r"|critic/explained_variance|critic/loss|kl"
)

_QUICK_START = {
    "text-generation": '{"role": "user", "content": "What is 12 + 30?"}',
    "image-text-to-text": '{"role": "user", "content": [{"type": "image", "path": "figure.png"}, '
    '{"type": "text", "text": "Find $x$."}]}',
}


def complete_model_card(
    path: Path,
    args: SAPOConfig,
    log_history: list[dict[str, float]],
    model_id: str,
    takes_images: bool,
    segmenter: Segmenter | None = None,
) -> None:
    """
    Add the description of the training to a card that TRL has written.

    Args:
        path (`Path`): the card.
        args ([`SAPOConfig`]): configuration of the run.
        log_history (`list[dict[str, float]]`): the trainer's log.
        model_id (`str`): hub id, or name of the folder.
        takes_images (`bool`): whether it is an image-text model.
        segmenter ([`Segmenter`], *optional*): a segmenter that the configuration does not name.
    """
    card = ModelCard.load(path)
    text = card.text
    run = f"{_method(args, segmenter)}\n\n{_settings(args)}\n\n{_results(log_history)}"
    for pattern, replacement in (
        (r"(?<=## Quick start\n).*?(?=## Training procedure)", _quick_start(model_id, takes_images)),
        (r"This model was trained with [^\n]*", run),
        (r"(?=- TRL: )", f"- sapo_trl: {version('sapo_trl')}\n"),
    ):
        # A function as replacement, because settings may hold backslashes.
        text, replaced = re.subn(pattern, lambda _, by=replacement: by, text, count=1, flags=re.DOTALL)
        if not replaced:
            text += f"\n{replacement}\n"
    # TRL writes this link for a base model that is a folder.
    card.text = text.replace("[None](https://huggingface.co/None)", "a model that is not on the Hub")
    card.save(path)


def _quick_start(model_id: str, takes_images: bool) -> str:
    task = "image-text-to-text" if takes_images else "text-generation"
    argument = "text=" if takes_images else ""
    return f"""
```python
from transformers import pipeline

generator = pipeline("{task}", model="{model_id}", device_map="auto")
messages = [{_QUICK_START[task]}]
print(generator({argument}messages, max_new_tokens=512, return_full_text=False)[0]["generated_text"])
```

"""


def _method(args: SAPOConfig, segmenter: Segmenter | None) -> str:
    closest = closest_preset(args)
    if closest.name == DEFAULTS:
        algorithm = f"{DEFAULTS} ({DEFAULTS_SUMMARY})"
    else:
        preset = PRESETS[closest.name]
        algorithm = f"the preset `{closest.name}` ({preset.summary}; {preset.source})"
    if closest.differences:
        changed = ", ".join(f"`{name}={value!r}`" for name, value in closest.differences.items())
        algorithm += f", but for {changed}"
    if segmenter is not None:
        algorithm += f", cutting responses with `{getattr(segmenter, '__name__', type(segmenter).__name__)}`"
    return (
        f"This model was trained by the `SAPOTrainer` of sapo_trl with {algorithm}.\n\n"
        "> SAPO here is **Segment-Aligned** Policy Optimization (ICML 2026, "
        "[arXiv 2605.01327](https://huggingface.co/papers/2605.01327)), not Qwen's *Soft Adaptive* Policy "
        "Optimization ([arXiv 2511.20347](https://huggingface.co/papers/2511.20347)), which TRL's "
        '`loss_type="sapo"` selects.'
    )


def _settings(args: SAPOConfig) -> str:
    rows = [(name, getattr(args, name)) for name in _SETTINGS]
    if args.segmentation != "entropy":
        rows = [row for row in rows if row[0] != "top_percent"]
    return "### Settings\n\n" + _table(("Setting", "Value"), [(f"`{name}`", f"`{value}`") for name, value in rows])


def _results(log_history: list[dict[str, float]]) -> str:
    latest: dict[str, tuple[float, int]] = {}
    for entry in log_history:
        for name, value in with_present_names(entry).items():
            if re.fullmatch(_RESULTS, name) and isinstance(value, int | float):
                latest[name] = (value, int(entry.get("step", 0)))
    if not latest:
        return "### Results\n\nNothing was logged."
    rows = [(f"`{name}`", f"{value:.4g}", str(step)) for name, (value, step) in sorted(latest.items())]
    return (
        "### Results\n\nThe last logged values. Values without `eval_` are means over responses to training prompts: "
        f"no evaluation.\n\n{_table(('Metric', 'Value', 'Step'), rows)}"
    )


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
