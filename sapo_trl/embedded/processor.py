"""Qwen2.5-VL's processor for machines without torchvision (for example with CPU builds of torch)."""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from .drawing import IMAGE_SIZE
from .tokenizer import build_tokenizer


# White becomes 0 and ink negative. With CLIP's statistics, the default, white is a large constant, and the tiny vision
# tower does not learn to read.
IMAGE_MEAN = [1.0, 1.0, 1.0]
IMAGE_STD = [0.3, 0.3, 0.3]


class Qwen2_5_VLImageTextProcessor(Qwen2_5_VLProcessor):
    """
    Qwen2.5-VL's processor without its video part, which transformers can only build with torchvision.

    Images and text are processed exactly as by the stock class. transformers reads the names of the parts off this
    signature, so that saving and loading leave the video processor out as well.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)


# Lets `AutoProcessor.from_pretrained` load files that this class has saved.
AutoProcessor.register(Qwen2_5_VLConfig, Qwen2_5_VLImageTextProcessor, exist_ok=True)


def _assemble(image_processor, tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLProcessor:
    if not is_torchvision_available():
        return Qwen2_5_VLImageTextProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    from transformers import Qwen2VLVideoProcessor

    return Qwen2_5_VLProcessor(
        image_processor, tokenizer, Qwen2VLVideoProcessor(), chat_template=tokenizer.chat_template
    )


def build_processor(tokenizer: PreTrainedTokenizerBase | None = None) -> Qwen2_5_VLProcessor:
    """
    Build the processor of the embedded task: Qwen's PIL image processor, set for its 56×56 pictures, and a tokenizer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer with Qwen2.5-VL's special tokens and a chat template. Defaults to [`build_tokenizer`]'s.

    Returns:
        [`~transformers.Qwen2_5_VLProcessor`]: The stock class where torchvision is installed, else
        [`Qwen2_5_VLImageTextProcessor`].
    """
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2},
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    return _assemble(image_processor, tokenizer or build_tokenizer())


def load_processor(name_or_path: str | Path, **kwargs) -> ProcessorMixin | PreTrainedTokenizerBase:
    """
    Load any model's processor; Qwen2.5-VL's also without torchvision.

    Args:
        name_or_path (`str` or `Path`):
            Folder or hub id.
        **kwargs:
            Passed on to `from_pretrained` (`revision`, `trust_remote_code`, ...).

    Returns:
        The processor, or the tokenizer of a text model, with padding and truncation on the left as generation needs.
    """
    kwargs = {"padding_side": "left", "truncation_side": "left", **kwargs}
    config = AutoConfig.from_pretrained(
        name_or_path, **{k: v for k, v in kwargs.items() if k in ("revision", "trust_remote_code")}
    )
    if not isinstance(config, Qwen2_5_VLConfig):
        return AutoProcessor.from_pretrained(name_or_path, **kwargs)
    if not is_torchvision_available():
        return Qwen2_5_VLImageTextProcessor.from_pretrained(name_or_path, **kwargs)
    processor = AutoProcessor.from_pretrained(name_or_path, **kwargs)
    if isinstance(processor, Qwen2_5_VLImageTextProcessor):  # saved where there was no torchvision
        return _assemble(processor.image_processor, processor.tokenizer)
    return processor
