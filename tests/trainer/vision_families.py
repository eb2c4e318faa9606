"""Tiny image-text models of families that lay out their images in other ways than Qwen's, built without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import (
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SmolVLMForConditionalGeneration,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from sapo_trl.embedded import build_tokenizer


SIZE, PATCH_SIZE = 28, 14
"""Height and width in pixels of what a vision tower takes at a time, and of its patches: four of them."""
SQUARE = {"height": SIZE, "width": SIZE}

_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}{{ 'IMAGE' if part['type'] == 'image' else part['text'] }}{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


class InternVLImageTextProcessor(InternVLProcessor):
    """InternVL's processor without its video part, which transformers can only build with torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=1, chat_template=None, **kwargs):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)
        super().__init__(image_processor, tokenizer, None, image_seq_length, chat_template, **kwargs)


@dataclass
class VisionFamily:
    """A model family with its processor."""

    processor: ProcessorMixin
    model_class: type[PreTrainedModel]
    settings: dict[str, Any]

    def build_model(self, seed: int = 0) -> PreTrainedModel:
        set_seed(seed)
        model = self.model_class(self.model_class.config_class(**self.settings))
        # Some start at zero. Gemma 3's projection of the pictures does: the model would be blind.
        for name, parameter in model.named_parameters():
            if "newline" in name or "position" in name or "input_projection" in name:
                parameter.data.normal_(std=0.1)
        return model


def _tokenizer(**tokens: str) -> PreTrainedTokenizerBase:
    """The embedded task's tokenizer with further special tokens, by the attribute that a processor looks for."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens.values())}, replace_extra_special_tokens=False)
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def _text(tokenizer: PreTrainedTokenizerBase, model_type: str, **settings: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **settings,
    }


def _vision(model_type: str, **settings: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": PATCH_SIZE,
        **settings,
    }


def _gemma3() -> VisionFamily:
    tokenizer = _tokenizer(image_token="<image_soft>", boi_token="<image_start>", eoi_token="<image_end>")
    images = Gemma3ImageProcessorPil(size=SQUARE)
    processor = Gemma3Processor(
        images, tokenizer, chat_template=_TEMPLATE.replace("IMAGE", "<image_start>"), image_seq_length=4
    )
    return VisionFamily(
        processor,
        Gemma3ForConditionalGeneration,
        {
            "text_config": _text(tokenizer, "gemma3_text", sliding_window=64, query_pre_attn_scalar=16),
            "vision_config": _vision("siglip_vision_model"),
            "mm_tokens_per_image": 4,
            "image_token_index": tokenizer.image_token_id,
            "boi_token_index": tokenizer.boi_token_id,
            "eoi_token_index": tokenizer.eoi_token_id,
            "initializer_range": 0.2,
        },
    )


def _llava_family(
    processor_class: type, images: Any, model_class: type[PreTrainedModel], **settings: Any
) -> VisionFamily:
    """A model of the LLaVA line: CLIP's tower and Llama's layers."""
    tokenizer = _tokenizer(image_token="<image>")
    processor = processor_class(
        images,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("IMAGE", "<image>"),
    )
    configs = {"text_config": _text(tokenizer, "llama"), "vision_config": _vision("clip_vision_model")}
    return VisionFamily(processor, model_class, {**configs, "image_token_index": tokenizer.image_token_id, **settings})


def _llava() -> VisionFamily:
    images = CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE)
    return _llava_family(LlavaProcessor, images, LlavaForConditionalGeneration, image_seq_length=4)


def _llava_next() -> VisionFamily:
    pinpoints = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    images = LlavaNextImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SQUARE, image_grid_pinpoints=pinpoints)
    return _llava_family(LlavaNextProcessor, images, LlavaNextForConditionalGeneration, image_grid_pinpoints=pinpoints)


def _internvl() -> VisionFamily:
    tokenizer = _tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = InternVLImageTextProcessor(
        images, tokenizer, image_seq_length=1, chat_template=_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>")
    )
    square = {"image_size": [SIZE, SIZE], "patch_size": [PATCH_SIZE, PATCH_SIZE]}
    return VisionFamily(
        processor,
        InternVLForConditionalGeneration,
        {
            "text_config": _text(tokenizer, "qwen2"),
            "vision_config": _vision("internvl_vision", **square),
            "image_token_id": tokenizer.context_image_token_id,
            "image_seq_length": 1,
        },
    )


def _idefics3(model_class: type[PreTrainedModel] = Idefics3ForConditionalGeneration) -> VisionFamily:
    tokenizer = _tokenizer(
        image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>"
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE})
    processor = Idefics3Processor(
        images, tokenizer, image_seq_len=1, chat_template=_TEMPLATE.replace("IMAGE", "<image>")
    )
    name = model_class.config_class.model_type
    return VisionFamily(
        processor,
        model_class,
        {
            "text_config": _text(processor.tokenizer, "llama"),
            "vision_config": _vision(f"{name}_vision"),
            "image_token_id": processor.image_token_id,
            "scale_factor": 2,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )


VISION_FAMILIES: dict[str, Callable[[], VisionFamily]] = {
    "gemma3": _gemma3,
    "llava": _llava,
    "llava_next": _llava_next,
    "internvl": _internvl,
    "idefics3": _idefics3,
    # With the processor of Idefics3, from which its own differs in videos.
    "smolvlm": lambda: _idefics3(SmolVLMForConditionalGeneration),
}


def picture(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    """Noise, so that no two pictures give the same features."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pictured_prompts(num_images: list[int]) -> Dataset:
    """
    Up to four prompts of unequal lengths.

    Args:
        num_images (`list[int]`): of each prompt; pictures alternate between square and wide ones, of several tiles.
    """
    sizes = ((SIZE, SIZE), (2 * SIZE, SIZE))
    rows = []
    for row, number in enumerate(num_images):
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"Find {'+'.join(['AB', 'BC', 'CD', 'DA'][: row + 1])}."}],
                "images": [picture(10 * row + index, *sizes[(row + index) % 2]) for index in range(number)],
            }
        )
    return Dataset.from_list(rows)
