"""The backends for generation, transformers and vLLM. Each is imported only when it is chosen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image
from transformers.utils import cached_file

from ..settings import EvalArguments


BATCH_SIZES = {"transformers": 16, "vllm": 256}
"""Default of `batch_size`: number of generations at a time."""
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Request:
    """
    A request for one generation.

    Args:
        prompt (`list[dict]` or `str`): messages, with a block `{"type": "image"}` for each image; or a text to
            continue.
        seed (`int`): seed of this generation's sampling, in [0, 2**63).
        images (`list` of PIL images): one for each image block.
    """

    prompt: list[dict[str, Any]] | str
    seed: int
    images: list[Image.Image] = field(default_factory=list)


@dataclass(frozen=True)
class Generation:
    """
    A model's response.

    Args:
        text (`str`): the text without special tokens.
        tokens (`int`): number of tokens, including the end token.
        finish_reason (`str`): `"stop"`, or `"length"` if it was cut off.
    """

    text: str
    tokens: int
    finish_reason: str


class Backend(Protocol):
    """An engine that continues prompts."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One generation for each request, in their order. Its randomness comes only from the request's seed."""


def make_backend(arguments: EvalArguments) -> Backend:
    """Load the model into the chosen backend. Raises `ValueError` for an adapter that is not in safetensors."""
    if (
        arguments.adapter
        and cached_file(arguments.adapter, ADAPTER, _raise_exceptions_for_missing_entries=False) is None
    ):
        # Both backends would load a pickle instead.
        raise ValueError(f"adapter={arguments.adapter!r} has no {ADAPTER}; no other format is loaded.")
    if arguments.backend == "vllm":
        from .vllm import VLLMBackend

        return VLLMBackend(arguments)
    from .transformers import TransformersBackend

    return TransformersBackend(arguments)


def generation_seed(seed: int, benchmark: str, problem_id: str, generation: int) -> int:
    """The seed of one generation, in [0, 2**63). It depends neither on other generations nor on their order."""
    name = "\0".join((str(seed), benchmark, problem_id, str(generation)))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


def plain_messages(prompt: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with joined blocks of text, for the chat templates of text models."""
    return [{**message, "content": message_text(message)} for message in prompt]


def texts_to_continue(prompts: Sequence[list[dict[str, Any]] | str], has_template: bool) -> list[str] | None:
    """
    Prompts as plain texts, for prompts that are texts and for models without a chat template.

    Args:
        prompts (`Sequence[list[dict] | str]`): prompts of one benchmark.
        has_template (`bool`): whether the model has a chat template.

    Returns:
        `list[str]`: the texts; `None` if the prompts are messages for the chat template.
    """
    if has_template and not any(isinstance(prompt, str) for prompt in prompts):
        return None
    return [
        prompt if isinstance(prompt, str) else "\n\n".join(map(message_text, prompt)) + "\n\n" for prompt in prompts
    ]


def prompt_text(prompt: Sequence[dict[str, Any]] | str) -> str:
    """The text of a prompt, for a reader."""
    return prompt if isinstance(prompt, str) else "\n\n".join(filter(None, map(message_text, prompt)))


def message_text(message: dict[str, Any]) -> str:
    """The text of a message."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)
