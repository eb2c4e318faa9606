"""Prompts of the benchmarks: templates, lettered options, and messages with images in their places."""

import re
from collections.abc import Sequence
from typing import Any

from ...data.templates import TEMPLATES, THINK
from ...rewards.choices import letters_of


FREE_FORM = TEMPLATES["think_boxed_below"]
ONE_LETTER = "{problem}\n\n" + THINK + r" The final answer MUST BE the letter of the right option, put in \boxed{}."
SEVERAL_LETTERS = ONE_LETTER + " If several options are right, give all their letters, separated by commas."

_PLACEHOLDER = re.compile(r"<image(?: ?\d+)?>")


def list_options(options: Sequence[str]) -> str:
    """Options as lines: `A. first`."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(letters_of(options), options, strict=True))


def ask(question: str, template: str, num_images: int = 0, in_place: bool = False) -> list[dict[str, Any]]:
    """
    A question as one user message.

    Args:
        question (`str`):
            The question, with its options.
        template (`str`):
            Text with `{problem}` that asks for a form of the answer.
        num_images (`int`, *optional*, defaults to `0`):
            Number of images of the question. They stand before it.
        in_place (`bool`, *optional*, defaults to `False`):
            Put an image at each `<image>` or `<image 1>` of the question instead.

    Returns:
        `list`: One message. Without images its content is a plain string, because some chat templates of text models
        cannot take blocks. Raises `ValueError` if placeholders and images differ in number.
    """
    text = template.replace("{problem}", question.strip())
    pieces = _PLACEHOLDER.split(text) if in_place else [""] * num_images + [text]
    if len(pieces) - 1 != num_images:
        raise ValueError(
            f"The question {question!r} has {len(pieces) - 1} image placeholders but {num_images} images; one "
            "placeholder each is needed."
        )
    if not num_images:
        return [{"role": "user", "content": text}]
    content: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        content += [{"type": "image"}, {"type": "text", "text": piece}]
    return [{"role": "user", "content": [block for block in content if block.get("text") != ""]}]
