"""A Qwen2.5-VL of about one million parameters."""

from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, set_seed

from .tokenizer import build_tokenizer


# With the usual 0.02 the loss of a model this small stays on the plateau where it guesses every length.
INITIALIZER_RANGE = 0.08


def build_config(tokenizer: PreTrainedTokenizerBase | None = None) -> Qwen2_5_VLConfig:
    """Build the configuration; special token ids and the vocabulary size are the tokenizer's."""
    tokenizer = tokenizer or build_tokenizer()
    token_id = tokenizer.convert_tokens_to_ids
    hidden_size = 128
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": INITIALIZER_RANGE,
            # Half a head's 32 channels, shared out over time, height and width as in the large models (16:24:24).
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [1],
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        initializer_range=INITIALIZER_RANGE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerBase | None = None, *, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """
    Build the untrained model of the embedded task (float32, on the CPU).

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer to fit the vocabulary to. Defaults to [`build_tokenizer`]'s.
        seed (`int`, *optional*, defaults to `0`):
            Decides the initial weights; seeds Python's, NumPy's and torch's global generators.
    """
    set_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(build_config(tokenizer))
