"""A Qwen2 tokenizer of about 300 tokens, trained here and now: no download."""

import random

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer
from trl.chat_template_utils import qwen2_5_vl_chat_template

from .problems import sample_problems
from .solutions import reference_solution


PAD_TOKEN = "<|endoftext|>"
EOS_TOKEN = "<|im_end|>"
SPECIAL_TOKENS = (
    "<|im_start|>",
    EOS_TOKEN,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2.5-VL's special tokens after `<|endoftext|>`, in the order of their ids."""

VOCABULARY_LIMIT = 400
"""More than the corpus can fill, so that every word of the task becomes one token; the result has about 300."""

_ROLES = "system\nYou are a helpful assistant.\nuser\nassistant\n"


def build_tokenizer() -> Qwen2Tokenizer:
    """
    Build the tokenizer of the embedded task: byte-level BPE with Qwen's pre-tokenization (each digit is a token of its
    own), Qwen's special tokens and Qwen2.5-VL's chat template. The same on every call.
    """
    # Ids are given to the 256 bytes first and to merges in the order of their counts, which is deterministic.
    bytes_only = Qwen2Tokenizer(vocab={byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))})
    rng = random.Random(0)
    corpus = [_ROLES] * 200
    for problem in sample_problems(200):
        corpus += [problem.question, reference_solution(problem, error_rate=0.5, rng=rng)]
    tokenizer = bytes_only.train_new_from_iterator(
        corpus, vocab_size=VOCABULARY_LIMIT, new_special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.eos_token = EOS_TOKEN
    tokenizer.pad_token = PAD_TOKEN
    tokenizer.padding_side = "left"
    tokenizer.chat_template = qwen2_5_vl_chat_template
    return tokenizer
