"""The lines of a short help: one style for `sapo-trl train` and `sapo-trl eval`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields

from ..settings import first_sentence


WIDTH = 110
"""Characters of a line, unless the terminal is narrower."""

_LEAST_WIDTH = 60


def terminal_width() -> int:
    """Characters of a line on this terminal: at most `WIDTH`, and wide enough for the texts' column."""
    return max(_LEAST_WIDTH, min(WIDTH, shutil.get_terminal_size().columns))


def help_sections(sections: Mapping[str, Iterable[str]], *dataclasses: type, width: int = WIDTH) -> list[str]:
    """
    Lines on settings, in sections.

    Args:
        sections (`Mapping[str, Iterable[str]]`): names of settings by the section's title.
        dataclasses (`type`): the classes of the settings.
        width (`int`, *optional*, defaults to `WIDTH`): characters of a line.
    """
    by_name = {field.name: field for kind in dataclasses for field in fields(kind) if field.init}
    lines: list[str] = []
    for title, names in sections.items():
        lines += ["", f"{title}:", *(help_line(f"--{name}", _described(by_name[name]), width) for name in names)]
    return lines


def help_line(option: str, text: str, width: int = WIDTH) -> str:
    """An option and its text, with the text in a column of its own."""
    beginning = f"  {option:<29} " if len(option) < 30 else f"  {option}\n{'':<32}"
    indent = " " * 32
    lines = textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return beginning + lines.lstrip()


def _described(setting: Field) -> str:
    """The first sentence of a setting's help, and its default."""
    text = first_sentence(setting.metadata.get("help", "").replace("%%", "%"))
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    if default in (MISSING, None, "", []):
        return text
    return f"{text} (default: {getattr(default, 'value', default)})"
