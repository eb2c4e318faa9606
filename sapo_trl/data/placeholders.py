"""
Placeholders.

A processor turns these texts into tokens that stand for pieces of pictures, videos or sounds.
"""

from transformers import PreTrainedTokenizerBase, ProcessorMixin


_NAMES = ("image_token", "boi_token", "video_token", "audio_token")
# Qwen's placeholders, for data that is cleaned without a processor.
_USUAL = ("<|image_pad|>", "<|video_pad|>")


def placeholders(processor: PreTrainedTokenizerBase | ProcessorMixin | None) -> tuple[str, ...]:
    """
    The placeholders of a model. A question must not contain them, because their tokens would have no image features.

    Args:
        processor (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The model's processor or tokenizer.

    Returns:
        `tuple[str, ...]`: The processor's placeholders. Empty for a tokenizer, because its model reads only text.
        Without a processor, Qwen's placeholders.
    """
    if processor is None:
        return _USUAL
    if not isinstance(processor, ProcessorMixin):
        return ()
    owners = (processor, getattr(processor, "tokenizer", None))
    found = [getattr(owner, name, None) for owner in owners for name in _NAMES]
    return tuple(dict.fromkeys(token for token in found if isinstance(token, str) and token))
