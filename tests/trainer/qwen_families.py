"""Tiny models of Qwen's families that the other tests do not build, and all families in one form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sapo_trl.embedded import build_processor, build_tokenizer
from tests.testing_utils import FAMILIES, Family, build_qwen3_vl_processor
from tests.trainer.vision_families import VISION_FAMILIES


class Qwen2VLImageTextProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor without its video part, which transformers can only build with torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)


@dataclass
class TriedFamily:
    """A family as the tests train it, with the modules that LoRA adapts."""

    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    make_model: Callable[[], PreTrainedModel]
    lora_targets: tuple[str, ...] = ("q_proj", "up_proj")

    @property
    def takes_images(self) -> bool:
        return isinstance(self.processing_class, ProcessorMixin)

    def build_model(self) -> PreTrainedModel:
        model = self.make_model()
        # New models embed the padding token as zero. Padding that leaks into a row would then change nothing.
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        model.get_input_embeddings().weight.data[tokenizer.pad_token_id].normal_()
        return model


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _text(tokenizer: PreTrainedTokenizerBase, **settings: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.05,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **settings,
    }


def _qwen2_vl_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2VLConfig:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    return Qwen2VLConfig(
        text_config=_text(tokenizer, rope_parameters=rope),
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "initializer_range": 0.05},
        initializer_range=0.05,
        **_special_tokens(tokenizer),
    )


def _qwen3_5_text(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # Three layers of linear attention before one of full attention, as in the family's models.
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    rope |= {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    return _text(tokenizer, num_hidden_layers=4, head_dim=16, rope_parameters=rope, **linear)


def _qwen3_5_text_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3_5TextConfig:
    return Qwen3_5TextConfig(**_qwen3_5_text(tokenizer))


def _qwen3_5_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3_5Config:
    return Qwen3_5Config(
        text_config=_qwen3_5_text(tokenizer),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "initializer_range": 0.05,
        },
        initializer_range=0.05,
        **_special_tokens(tokenizer),
    )


def _qwen2_vl_processor(tokenizer: PreTrainedTokenizerBase) -> Qwen2VLImageTextProcessor:
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 56**2})
    return Qwen2VLImageTextProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


_LINEAR_ATTENTION = ("q_proj", "up_proj", "in_proj_qkv", "out_proj")

QWEN_FAMILIES: dict[
    str,
    tuple[
        Callable[[PreTrainedTokenizerBase], PreTrainedTokenizerBase | ProcessorMixin],
        Callable[[PreTrainedTokenizerBase], PretrainedConfig],
        type[PreTrainedModel],
        tuple[str, ...],
    ],
] = {
    "qwen2_vl": (_qwen2_vl_processor, _qwen2_vl_config, Qwen2VLForConditionalGeneration, ("q_proj", "up_proj")),
    "qwen3_5": (lambda tokenizer: tokenizer, _qwen3_5_text_config, Qwen3_5ForCausalLM, _LINEAR_ATTENTION),
    # Its models have Qwen3-VL's processor.
    "qwen3_5_images": (
        build_qwen3_vl_processor,
        _qwen3_5_config,
        Qwen3_5ForConditionalGeneration,
        _LINEAR_ATTENTION,
    ),
}
"""Processing class, configuration, model class and modules for LoRA."""


def tried_family(name: str) -> TriedFamily:
    if name in VISION_FAMILIES:
        vision = VISION_FAMILIES[name]()
        return TriedFamily(vision.processor, vision.build_model)
    tokenizer = build_tokenizer()
    if name in QWEN_FAMILIES:
        processing, config, model_class, lora_targets = QWEN_FAMILIES[name]
        family = Family(name, processing(tokenizer), config, model_class)
        return TriedFamily(family.processing_class, family.build_model, lora_targets)
    processing = {"qwen2_5_vl": build_processor, "qwen3_vl": build_qwen3_vl_processor}
    family = FAMILIES[name](processing.get(name, lambda tokenizer: tokenizer)(tokenizer))
    return TriedFamily(family.processing_class, family.build_model)


TRIED_FAMILIES = {
    "qwen2": "Qwen2 (text)",
    "qwen3_5": "Qwen3.5 (text)",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_5_images": "Qwen3.5 (images)",
    "gemma3": "Gemma 3",
    "llava": "LLaVA",
    "llava_next": "LLaVA-NeXT",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "internvl": "InternVL",
}
"""Names in the documentation."""
