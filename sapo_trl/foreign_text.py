"""Texts that nobody here has written (responses, names from files) as pages, tables and terminals can show them."""

from __future__ import annotations

import re


# The controls of the writing direction, which reorder the text around them; the controls of terminals but for tabs and
# line breaks; and halves of characters, which cannot be written to a file.
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|&~]")


def visible(text: str) -> str:
    """The text with its invisible controls written out, such as `⟨U+202E⟩`, which turns the text behind it around."""
    return _CONTROLS.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def escape_markdown(text: str) -> str:
    """The text on one line, so that Markdown shows it as it is: not as marks, HTML or the end of a cell."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(visible(text).split()))
