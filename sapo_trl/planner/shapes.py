"""Sizes of models, counted on models without storage."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..embedded import build_config, build_tokenizer
from ..names import nearest_name
from .linear_attention import LinearAttention


@dataclass(frozen=True)
class VisionTower:
    """
    Sizes of a vision tower.

    Args:
        layers (`int`): number of blocks.
        hidden (`int`): width.
        intermediate (`int`): width inside the feed-forward part.
        patches_per_token (`int`): patches that are merged into one token of the text model.
        patch_values (`int`): numbers that describe one patch.
    """

    layers: int
    hidden: int
    intermediate: int
    patches_per_token: int
    patch_values: int


@dataclass(frozen=True)
class ModelShape:
    """
    Sizes of a model; counts are of parameters, widths of numbers per token.

    Args:
        parameters (`int`): all of them, tied ones once.
        backbone_parameters (`int`): without the LM head; a critic with a backbone of its own copies these.
        embedding_parameters (`int`): of the token embeddings.
        largest_layer_parameters (`int`): of the largest repeated block.
        root_parameters (`int`): of everything outside of repeated blocks.
        layers (`int`): decoder layers.
        hidden (`int`): width of the hidden states.
        intermediate (`int`): width inside the feed-forward part.
        query_width (`int`): heads times head size.
        key_width (`int`): key-value heads times head size.
        vocabulary (`int`): rows of the LM head.
        normalizes_queries (`bool`): whether queries and keys are normalized, as in Qwen3.
        gates_attention (`bool`): whether the attention's output is gated, as in Qwen3.5.
        linear_attention ([`~sapo_trl.planner.linear_attention.LinearAttention`], *optional*):
            sizes of the layers whose attention is linear, if there are any.
        vision ([`VisionTower`], *optional*): of a vision-language model.
    """

    parameters: int
    backbone_parameters: int
    embedding_parameters: int
    largest_layer_parameters: int
    root_parameters: int
    layers: int
    hidden: int
    intermediate: int
    query_width: int
    key_width: int
    vocabulary: int
    normalizes_queries: bool
    gates_attention: bool = False
    linear_attention: LinearAttention | None = None
    vision: VisionTower | None = None

    @property
    def full_attention_layers(self) -> int:
        """Layers with keys and values for each token."""
        return self.layers - (self.linear_attention.layers if self.linear_attention is not None else 0)

    @property
    def head_parameters(self) -> int:
        """Weights of the LM head, whether tied to the embeddings or not."""
        return self.vocabulary * self.hidden


def _qwen2_5_vl(hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool):
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": hidden,
        },
        tie_word_embeddings=tied,
    )


def _qwen3_vl_4b() -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
            "patch_size": 16,
            "deepstack_visual_indexes": [5, 11, 17],
            "num_position_embeddings": 2304,
        },
        tie_word_embeddings=True,
    )


def _qwen3_5_4b() -> Qwen3_5Config:
    return Qwen3_5Config(
        text_config={
            "hidden_size": 2560,
            "intermediate_size": 9216,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "vocab_size": 248320,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
            "patch_size": 16,
            "num_position_embeddings": 2304,
        },
        tie_word_embeddings=True,
    )


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
    )


# The published shapes, so that planning needs no download. The tests compare their parameter counts with the published
# ones. A fine-tuned checkpoint may have a few rows more in its embeddings (added tokens), which changes nothing here.
PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": lambda: _qwen2_5_vl(2048, 11008, 36, 16, 2, 151936, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": lambda: _qwen2_5_vl(3584, 18944, 28, 28, 4, 152064, tied=False),
    "Qwen/Qwen3-VL-4B-Thinking": _qwen3_vl_4b,
    # Its checkpoint also has 120,599,552 weights that predict several tokens. transformers leaves them out.
    "Qwen/Qwen3.5-4B": _qwen3_5_4b,
    # Rho-1.1B has the shape of TinyLlama-1.1B.
    "realtreetune/rho-1b-sft-MATH": lambda: _llama(2048, 5632, 22, 32, 4, 32000),
    # DeepSeekMath-7B has the shape of DeepSeek-LLM-7B.
    "realtreetune/deepseekmath-7b-sft-GSM8K": lambda: _llama(4096, 11008, 30, 32, 32, 102400),
    "embedded": lambda: build_config(build_tokenizer()),
}
"""Configurations of the models that `trainer_configs/` names."""


def model_config(name: str) -> PretrainedConfig:
    """
    Configuration of a model, from the table of published shapes or from a folder.

    Args:
        name (`str`): a key of [`PUBLISHED`], or a folder with a `config.json`.

    Raises:
        ValueError: if it is neither.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]()
    if not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"model_name_or_path={name!r} is neither a folder with a config.json nor a model whose shape is known."
            f"{nearest_name(name, PUBLISHED)} Known: {', '.join(PUBLISHED)}."
        )
    return AutoConfig.from_pretrained(name)


@lru_cache
def model_shape(name: str) -> ModelShape:
    """
    Sizes of a model; see [`model_config`] for `name` and errors. Nothing is loaded.

    Raises:
        ValueError: if the model is not a transformer decoder whose configuration says its widths as usual.
    """
    model = _without_storage(name)
    config, text = model.config, model.config.get_text_config()
    try:
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        widths = {
            "layers": text.num_hidden_layers,
            "hidden": text.hidden_size,
            "intermediate": text.intermediate_size,
            "query_width": text.num_attention_heads * head_size,
            "key_width": text.num_key_value_heads * head_size,
            "vocabulary": text.vocab_size,
            "linear_attention": _linear_attention(text),
        }
    except AttributeError as error:
        raise ValueError(f"The configuration of {name!r} has no usual decoder's sizes: {error}.") from error
    blocks = [
        [_count(block) for block in modules]
        for modules in model.modules()
        if isinstance(modules, nn.ModuleList) and len(modules) > 1
    ]
    return ModelShape(
        parameters=_count(model),
        backbone_parameters=_count(model.base_model),
        embedding_parameters=_count(model.get_input_embeddings()),
        largest_layer_parameters=max((max(counts) for counts in blocks), default=_count(model)),
        root_parameters=max(_count(model) - sum(map(sum, blocks)), 0),
        normalizes_queries=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        # The gate's weights are in the matrix of the queries.
        gates_attention=any(
            name.endswith("self_attn.q_proj.weight") and len(weight) == 2 * widths["query_width"]
            for name, weight in model.named_parameters()
        ),
        vision=_vision_tower(config),
        **widths,
    )


@lru_cache
def lora_parameters(name: str, rank: int, targets: tuple[str, ...] | str | None) -> int:
    """
    Parameters of a LoRA adapter, counted on the model that PEFT makes.

    Args:
        name (`str`): the base model, as for [`model_config`].
        rank (`int`): of the adapter.
        targets (`tuple[str]` or `str`, *optional*): `target_modules` of PEFT; `None` for its choice.

    Raises:
        ValueError: if it is left to PEFT, which has no choice for this model.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, target_modules=list(targets) if isinstance(targets, tuple) else targets
    )
    model = _without_storage(name)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights that are not there
        return get_peft_model(model, config).get_nb_trainable_parameters()[0]


def _without_storage(name: str) -> PreTrainedModel:
    config = model_config(name)
    takes_images = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto_class = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    with torch.device("meta"):
        return auto_class.from_config(config)


def _linear_attention(text: PretrainedConfig) -> LinearAttention | None:
    layers = (getattr(text, "layer_types", None) or []).count("linear_attention")
    if layers == 0:
        return None
    return LinearAttention(
        layers=layers,
        key_heads=text.linear_num_key_heads,
        value_heads=text.linear_num_value_heads,
        key_size=text.linear_key_head_dim,
        value_size=text.linear_value_head_dim,
        kernel=text.linear_conv_kernel_dim,
    )


def _vision_tower(config: PretrainedConfig) -> VisionTower | None:
    vision = getattr(config, "vision_config", None)
    if vision is None or not hasattr(vision, "spatial_merge_size"):  # of another family: weights count, images do not
        return None
    return VisionTower(
        layers=vision.depth,
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        patches_per_token=vision.spatial_merge_size**2,
        patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
