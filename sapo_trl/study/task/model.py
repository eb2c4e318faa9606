"""The small models of the study: a Qwen2.5-VL that sees the picture, a Qwen2 that reads it as text."""

from dataclasses import dataclass

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)

from ...embedded import build_config
from ...embedded.model import INITIALIZER_RANGE


@dataclass(frozen=True)
class ModelSize:
    """
    Size of the language model.

    Args:
        hidden_size (`int`, *optional*, defaults to `128`): a multiple of 64.
        layers (`int`, *optional*, defaults to `3`): its layers.
    """

    hidden_size: int = 128
    layers: int = 3

    def __post_init__(self):
        if self.hidden_size < 64 or self.hidden_size % 64 != 0:
            raise ValueError(f"`hidden_size` must be a multiple of 64, from 64 on, got {self.hidden_size!r}.")
        if self.layers < 2:
            raise ValueError(f"`layers` must be at least 2, because finding a gate takes two, got {self.layers!r}.")


def build_model(
    tokenizer: PreTrainedTokenizerBase, *, pictures: bool = True, size: ModelSize | None = None, seed: int = 0
) -> PreTrainedModel:
    """
    Build the untrained model (float32, on the CPU).

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer to fit the vocabulary to.
        pictures (`bool`, *optional*, defaults to `True`):
            Whether it has a vision tower.
        size ([`ModelSize`], *optional*):
            Size of the language model.
        seed (`int`, *optional*, defaults to `0`):
            Decides the initial weights; seeds Python's, NumPy's and torch's global generators.
    """
    size = size or ModelSize()
    set_seed(seed)
    if pictures:
        return Qwen2_5_VLForConditionalGeneration(_vision_config(tokenizer, size))
    return Qwen2ForCausalLM(_text_config(tokenizer, size))


def _vision_config(tokenizer: PreTrainedTokenizerBase, size: ModelSize) -> Qwen2_5_VLConfig:
    config = build_config(tokenizer).to_dict()
    text, vision = config["text_config"], config["vision_config"]
    del text["layer_types"]  # derived from the number of layers
    quarter = size.hidden_size // 32
    rope = {**text["rope_parameters"], "mrope_section": [quarter, quarter + quarter // 2, quarter + quarter // 2]}
    text |= {
        "hidden_size": size.hidden_size,
        "intermediate_size": 3 * size.hidden_size,
        "num_hidden_layers": size.layers,
        "rope_parameters": rope,
    }
    vision["out_hidden_size"] = size.hidden_size
    return Qwen2_5_VLConfig.from_dict(config)


def _text_config(tokenizer: PreTrainedTokenizerBase, size: ModelSize) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
