"""The parts of a training run that its arguments ask for: the segmenter, the token weights and the critic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator, DistributedType
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from trl.trainer.utils import get_config_model_id

from ..config import SAPOConfig
from ..critic.deepspeed import DeepSpeedCritic
from ..critic.freezing import freeze_attention
from ..critic.training import Critic
from ..critic.value_head import HEAD_CONFIG_NAME, SegmentValueHead, backbone_of, hidden_size_of
from ..rewards.signatures import check_reward_arguments
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
from .adapters import check_adapters, disable_dropout
from .checks import check_adapter_name, check_prompt_column, datasets_of
from .rollout_checks import check_rollouts_ahead


def default_arguments(model: str | PreTrainedModel) -> SAPOConfig:
    """The configuration of a run without `args`: the defaults, in a folder named after the model."""
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return SAPOConfig(f"{name.split('/')[-1]}-SAPO")


def check_arguments(
    model: str | PreTrainedModel,
    args: SAPOConfig,
    value_model: Any,
    segmenter: Any,
    token_weighting: Any,
    others: dict[str, Any],
) -> None:
    """
    Check the arguments of [`SAPOTrainer`] that TRL does not know, or that exclude each other.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): the policy.
        args ([`SAPOConfig`]): settings of the run.
        value_model (`Any`): the argument of this name.
        segmenter (`Any`): the argument of this name.
        token_weighting (`Any`): the argument of this name.
        others (`dict[str, Any]`): TRL's arguments, the reward functions included.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for arguments that exclude each other or data that cannot be trained on.
    """
    if not isinstance(args, SAPOConfig):
        raise TypeError(f"`args` must be a `SAPOConfig`, got `{type(args).__name__}`.")
    evaluated = datasets_of(others.get("eval_dataset"))
    if others.get("environment_factory") is None:  # an environment may bring the prompts
        check_prompt_column(others.get("train_dataset"), "train_dataset")
        for name, dataset in evaluated.items():
            check_prompt_column(dataset, name)
    if others.get("environment_factory") is None and others.get("rollout_func") is None:  # they may bring arguments
        for name, dataset in {"train_dataset": others.get("train_dataset"), **evaluated}.items():
            if getattr(dataset, "column_names", None) is not None:
                check_reward_arguments(others.get("reward_funcs"), dataset.column_names, name)
    if token_weighting is not None and not isinstance(token_weighting, RoleAwareWeighting):
        raise TypeError(
            f"`token_weighting` must be a `RoleAwareWeighting`, got {token_weighting!r}. Its fields take other "
            "functions."
        )
    if segmenter is not None and (isinstance(segmenter, type) or not callable(segmenter)):
        raise TypeError(
            f"`segmenter` must be a callable `(entropies, mask) -> Segments`, got {segmenter!r}. Pass an "
            "instance, or name one of the built-in ones with `SAPOConfig(segmentation=...)`."
        )
    if value_model is not None and not args.learns_critic:
        raise ValueError(f"`value_model` was given, but `critic={args.critic!r}`: drop one of the two.")
    check_rollouts_ahead(args, others)
    if args.critic in ("monte_carlo", "tree"):
        for name in ("rollout_func", "environment_factory", "tools"):
            if others.get(name):
                raise ValueError(
                    f"`critic={args.critic!r}` continues responses from their tokens alone; `{name}` decides on "
                    "responses in another way and cannot be combined with it."
                )
    check_adapters(model, others.get("peft_config"), args)
    check_adapter_name(model, args.beta)
    if args.critic == "adapter" and others.get("peft_config") is None and not hasattr(model, "peft_config"):
        raise ValueError(
            '`critic="adapter"` lives beside the policy\'s adapter: pass a `peft_config` (or a policy that has an '
            "adapter)."
        )
    quantized = others.get("quantization_config") or (args.model_init_kwargs or {}).get("quantization_config")
    if quantized is not None and args.critic == "separate" and value_model is None:
        raise ValueError(
            'A quantized policy cannot be copied into a trainable critic: use `critic="ladder"`, '
            '`critic="adapter"` or `critic="shared"`, or pass a `value_model` in a floating-point dtype.'
        )


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
    if args.segmentation == "sequence":
        return SequenceSegmenter()
    raise ValueError(f"`segmentation={args.segmentation!r}` has no segmenter here.")


def make_token_weighting(args: SAPOConfig) -> RoleAwareWeighting | None:
    """The token weights that a configuration asks for."""
    if args.advantage_weighting == "none":
        return None
    return RoleAwareWeighting(
        perception_pattern=args.role_perception_pattern,
        reasoning_pattern=args.role_reasoning_pattern,
        temperature=args.role_temperature,
        clip=args.role_clip,
    )


def make_value_head(
    model: str | PreTrainedModel, value_model: str | SegmentValueHead | PreTrainedModel | None, args: SAPOConfig
) -> SegmentValueHead:
    """
    The critic, from the user's `value_model` or from the policy.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): the policy.
        value_model (`str` or [`SegmentValueHead`] or [`~transformers.PreTrainedModel`], *optional*):
            the critic, or the model to make it from.
        args ([`SAPOConfig`]): settings of the run.

    Returns:
        [`SegmentValueHead`]
    """
    source = model if value_model is None else value_model
    sizes = {name: getattr(args, f"critic_{name}") for name in ("layers", "width", "reads")}
    if isinstance(source, SegmentValueHead):
        if source.mode != args.critic:
            raise ValueError(
                f"`value_model` is a {source.mode!r} critic, but `critic={args.critic!r}`: set "
                f'`critic="{source.mode}"`, or leave `value_model` out.'
            )
        source.check_sizes("`value_model`", **sizes)
        return source
    if isinstance(source, str):
        is_saved = cached_file(source, HEAD_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is not None
        if value_model is not None and args.reads_policy and not is_saved:
            raise _no_whole_model(args)
        policy = {"policy": model} if args.critic == "adapter" else {}
        kwargs = policy | sizes | _loading_kwargs(args, is_policy=source == model)
        value_head = SegmentValueHead.from_pretrained(source, mode=args.critic, **kwargs)
        _check_not_quantized(value_head.backbone)
        return value_head
    if value_model is None:
        return SegmentValueHead.from_policy(source, mode=args.critic, **sizes)
    if args.critic != "separate":
        raise _no_whole_model(args)
    _check_not_quantized(source)
    if source is model or hasattr(source, "peft_config"):
        return SegmentValueHead.from_policy(source)  # a copy, adapters merged
    return SegmentValueHead(hidden_size_of(source), backbone_of(source))


def make_critic(
    value_head: SegmentValueHead,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SAPOConfig,
    accelerator: Accelerator,
    decayed: Callable[[nn.Module], list[str]],
) -> Critic:
    """
    The critic with its optimizer.

    Args:
        value_head ([`SegmentValueHead`]): its model.
        policy ([`~transformers.PreTrainedModel`]): must read the same inputs.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the policy.
        args ([`SAPOConfig`]): settings of the run.
        accelerator ([`~accelerate.Accelerator`]): of the run.
        decayed (`Callable`): a model to the names of its parameters that weight decay applies to.
    """
    check_value_model(value_head, policy, tokenizer)
    if args.disable_dropout:
        disable_dropout(value_head)
        if value_head.adapter is not None:  # in the policy, added after TRL has disabled its dropout
            disable_dropout(policy)
    if value_head.backbone is not None and args.gradient_checkpointing:
        value_head.backbone.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    value_head.output.set_range(args.value_range)
    if args.freeze_critic_attention:
        freeze_attention(value_head.backbone)
    if value_head.ladder is not None:
        value_head.ladder.checkpoints = args.gradient_checkpointing
    has_engine = value_head.mode == "separate" and accelerator.distributed_type == DistributedType.DEEPSPEED
    critic_class = DeepSpeedCritic if has_engine else Critic
    return critic_class(value_head, args, accelerator, [*decayed(value_head), *decayed(policy)])


def _no_whole_model(args: SAPOConfig) -> ValueError:
    return ValueError(
        f"`value_model` is a whole model, but a critic of mode {args.critic!r} is none: leave `value_model` out, or "
        "pass a saved critic of this mode."
    )


def _check_not_quantized(value_model: PreTrainedModel | None) -> None:
    if getattr(value_model, "is_quantized", False):
        raise ValueError("`value_model` is quantized, which cannot be trained: load it in a floating-point dtype.")


def _loading_kwargs(args: SAPOConfig, is_policy: bool) -> dict[str, Any]:
    """How TRL loads the policy, for a critic from a folder or the Hub. `revision` is the policy's alone."""
    kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    # The critic is trained as a whole, on one device.
    for name in ("device_map", "quantization_config", *(() if is_policy else ("revision",))):
        kwargs.pop(name, None)
    return kwargs


def check_tokenizer_of(value_model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` if the value model's folder has a tokenizer that differs from the policy's."""
    # A critic saved beside its policy has no tokenizer, and transformers would make an empty one up.
    if cached_file(value_model, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is None:
        return
    value_tokenizer = AutoTokenizer.from_pretrained(value_model)
    check_same_tokenizer(value_tokenizer, tokenizer, value_model)


def check_value_model(
    value_head: SegmentValueHead, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """
    Check that a critic can read the policy's inputs.

    Args:
        value_head ([`SegmentValueHead`]): the critic.
        policy ([`~transformers.PreTrainedModel`]): the policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the policy.

    Raises:
        ValueError: if the vocabularies or the kinds of input differ.
    """
    if value_head.backbone is None:
        value_head.check_reads(policy)
        return

    policy_backbone = backbone_of(policy)
    policy_parameters = {id(parameter) for parameter in policy.parameters()}
    if any(id(parameter) in policy_parameters for parameter in value_head.parameters()):
        raise ValueError(
            "The value model shares parameters with the policy, so that each would be trained by both losses: pass a "
            '`copy.deepcopy` of it, or use `critic="shared"`, which reads the policy without training it.'
        )
    critic_config, policy_config = value_head.backbone.config, policy_backbone.config
    critic_vocab = critic_config.get_text_config().vocab_size
    policy_vocab = policy_config.get_text_config().vocab_size
    if critic_vocab != policy_vocab:
        raise ValueError(
            f"The value model's vocabulary has {critic_vocab} entries, the policy's {policy_vocab} (its tokenizer "
            f"{len(tokenizer)}): the value model must be of the same model family."
        )
    # The settings that decide what an image is to a model; both models get the same tensors.
    for name in ("image_token_id", "patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels"):
        critic_value, policy_value = _image_setting(critic_config, name), _image_setting(policy_config, name)
        if critic_value != policy_value:
            raise ValueError(
                f"The value model ({critic_config.model_type}) and the policy ({policy_config.model_type}) must take "
                f"the same images, but `{name}` is {critic_value} and {policy_value}."
            )


def check_same_tokenizer(
    value_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, value_model: str
) -> None:
    """
    Args:
        value_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the value model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the policy.
        value_model (`str`): name of the value model.

    Raises:
        ValueError: if a token has another id in the value model's tokenizer.
    """
    vocabulary, value_vocabulary = tokenizer.get_vocab(), value_tokenizer.get_vocab()
    differing = [token for token, index in vocabulary.items() if value_vocabulary.get(token) != index]
    if differing:
        raise ValueError(
            f"The value model {value_model!r} has another tokenizer than the policy: {len(differing)} of "
            f"{len(vocabulary)} tokens have another id or are unknown, for example {sorted(differing)[0]!r}."
        )


def _image_setting(config: Any, name: str) -> Any:
    return getattr(config, name, getattr(getattr(config, "vision_config", None), name, None))
