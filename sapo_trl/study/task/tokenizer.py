"""A Qwen2 tokenizer with one token for each word of the task, trained here and now: no download."""

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from ...embedded.tokenizer import EOS_TOKEN, PAD_TOKEN, SPECIAL_TOKENS
from .vocabulary import CELLS, FILLER_WORDS, LABELS, RIGHT, SIGNS, WRONG


# Special tokens and the bare minimum around a message: every token of a prompt is read again for each continuation.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>
{%- endif -%}"""

VOCABULARY_LIMIT = 1000
"""More than the corpus can fill, so that every word becomes one token."""


def build_tokenizer() -> Qwen2Tokenizer:
    """
    Build the tokenizer of every task of the family: byte-level BPE with Qwen's pre-tokenization (each digit is a token
    of its own), Qwen's special tokens, and a chat template that adds no words. The same on every call.
    """
    # Ids are given to the 256 bytes first and to merges in the order of their counts, which is deterministic.
    bytes_only = Qwen2Tokenizer(vocab={byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))})
    words = [*CELLS, *SIGNS, *FILLER_WORDS, RIGHT, WRONG]
    corpus = [" " + " ".join(words), "\n".join(LABELS), *(f"\n{word}" for word in (*CELLS, RIGHT, WRONG))]
    tokenizer = bytes_only.train_new_from_iterator(
        corpus * 20, vocab_size=VOCABULARY_LIMIT, new_special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.eos_token = EOS_TOKEN
    tokenizer.pad_token = PAD_TOKEN
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
