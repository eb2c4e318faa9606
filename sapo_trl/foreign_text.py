"""Makes texts from outside (responses, names from files) safe for pages, tables and terminals."""

from __future__ import annotations

import re


# Controls of the writing direction reorder the text around them. Controls of terminals are also replaced, except tabs
# and line breaks. Halves of characters cannot be written to a file.
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|&~]")


def visible(text: str) -> str:
    """The text with names for its invisible controls, such as `⟨U+202E⟩`, which reverses the text after it."""
    return _CONTROLS.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def escape_markdown(text: str) -> str:
    """The text on one line, escaped for Markdown: it cannot become marks, HTML or the end of a cell."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(visible(text).split()))
