"""The parts of a training run that a configuration asks for: its segmenter and its critic."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..config import SAPOConfig
from ..critic.value_head import SegmentValueHead, backbone_of, hidden_size_of
from ..role_aware import RoleAwareWeighting
from ..segmentation import (
    CutpointSegmenter,
    EntropySegmenter,
    NewlineSegmenter,
    ProbabilitySegmenter,
    Segmenter,
    SequenceSegmenter,
    StepSegmenter,
    TokenSegmenter,
)
from .checks import check_same_tokenizer


def make_segmenter(args: SAPOConfig) -> Segmenter:
    """The segmenter that a configuration asks for."""
    if args.segmentation == "entropy":
        return EntropySegmenter(args.top_percent, args.segment_cut)
    if args.segmentation == "probability":
        return ProbabilitySegmenter(args.num_cuts, args.segment_cut)
    if args.segmentation == "cutpoints":
        return CutpointSegmenter(args.cutpoint_threshold, args.cutpoint_interval)
    if args.segmentation == "newline":
        return NewlineSegmenter()
    if args.segmentation == "step":
        return StepSegmenter(args.step_pattern)
    if args.segmentation == "token":
        return TokenSegmenter()
    return SequenceSegmenter()


def make_role_aware_weighting(args: SAPOConfig) -> RoleAwareWeighting:
    """The token weights that a configuration asks for."""
    return RoleAwareWeighting(
        perception_pattern=args.role_perception_pattern,
        reasoning_pattern=args.role_reasoning_pattern,
        mask_ratio=args.role_mask_ratio,
        temperature=args.role_temperature,
        clip=args.role_clip,
        seed=args.seed,
    )


def make_value_head(
    model: str | PreTrainedModel, value_model: str | SegmentValueHead | PreTrainedModel | None, args: SAPOConfig
) -> SegmentValueHead:
    """
    The critic, from what the user gave or from the policy.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): the policy.
        value_model (`str` or [`SegmentValueHead`] or [`~transformers.PreTrainedModel`], *optional*):
            the critic, or the model to make it from.
        args ([`SAPOConfig`]): settings of the run.

    Returns:
        [`SegmentValueHead`]
    """
    source = model if value_model is None else value_model
    if isinstance(source, SegmentValueHead):
        if source.mode != args.critic:
            raise ValueError(f"`value_model` is a {source.mode!r} critic, but `critic={args.critic!r}`.")
        return source
    if isinstance(source, str):
        policy = {"policy": model} if args.critic == "adapter" else {}
        value_head = SegmentValueHead.from_pretrained(source, mode=args.critic, **policy, **_loading_kwargs(args))
        _check_not_quantized(value_head.backbone)
        return value_head
    if value_model is None:
        return SegmentValueHead.from_policy(source, mode=args.critic)
    if args.critic != "separate":
        raise ValueError(
            f"`value_model` is a whole model, but a critic of mode {args.critic!r} is a part of the policy."
        )
    _check_not_quantized(source)
    if source is model or hasattr(source, "peft_config"):
        return SegmentValueHead.from_policy(source)  # a copy, adapters merged
    return SegmentValueHead(hidden_size_of(source), backbone_of(source))


def _check_not_quantized(value_model: PreTrainedModel | None) -> None:
    if getattr(value_model, "is_quantized", False):
        raise ValueError("`value_model` is quantized, which cannot be trained: load it in a floating-point dtype.")


def _loading_kwargs(args: SAPOConfig) -> dict[str, Any]:
    """How TRL loads the policy, for a critic that starts from the same checkpoint."""
    kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    for name in ("device_map", "quantization_config"):  # the critic is trained as a whole, on one device
        kwargs.pop(name, None)
    return kwargs


def check_tokenizer_of(value_model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` if the value model's folder has a tokenizer that differs from the policy's."""
    # A critic saved beside its policy has no tokenizer, and transformers would make an empty one up.
    if cached_file(value_model, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is None:
        return
    value_tokenizer = AutoTokenizer.from_pretrained(value_model)
    check_same_tokenizer(value_tokenizer, tokenizer, value_model)
