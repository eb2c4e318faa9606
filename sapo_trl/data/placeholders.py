"""Placeholders: the texts that a processor turns into tokens which stand for pieces of pictures, videos or sounds."""

from transformers import PreTrainedTokenizerBase, ProcessorMixin


_NAMES = ("image_token", "boi_token", "video_token", "audio_token")
# Qwen's, for data that is cleaned without a processor.
_USUAL = ("<|image_pad|>", "<|video_pad|>")


def placeholders(processor: PreTrainedTokenizerBase | ProcessorMixin | None) -> tuple[str, ...]:
    """
    Texts that a question must not contain: their tokens would have no features to stand for.

    Args:
        processor (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The model's.

    Returns:
        `tuple[str, ...]`: Those of the model; none for a tokenizer, whose model reads only text. Without a processor
        Qwen's.
    """
    if processor is None:
        return _USUAL
    if not isinstance(processor, ProcessorMixin):
        return ()
    owners = (processor, getattr(processor, "tokenizer", None))
    found = [getattr(owner, name, None) for owner in owners for name in _NAMES]
    return tuple(dict.fromkeys(token for token in found if isinstance(token, str) and token))
