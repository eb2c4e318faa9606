"""Reads JSON files that may be old, broken or from someone else. Every error names the file and its fault."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Each:
    """
    A shape: a JSON object with arbitrary names.

    Args:
        shape (`Shape`): shape of each value.
    """

    shape: Shape


Shape = type | tuple[type, ...] | dict[str, "Shape"] | Each
"""A form of JSON values: a type, an object with at least these names, or an [`Each`]."""

NUMBER = (int, float)

_WORDS = {
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def read_json(path: Path, shape: Shape = object) -> Any:
    """
    Read a JSON file.

    Args:
        path (`Path`): the file.
        shape (`Shape`, *optional*): the shape of its content; by default any shape.

    Returns:
        The decoded content.

    Raises:
        ValueError: if the content is not JSON or has another shape.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error
    check_shape(content, shape, str(path))
    return content


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """
    Read a file with a JSON object on each line.

    The last line may be cut: a run may be killed while it writes.

    Args:
        path (`Path`): the file.

    Returns:
        `tuple[list[dict], list[str]]`: the objects, and a note if the last line was left out.

    Raises:
        ValueError: if any other line is not a JSON object.
    """
    entries = []
    # Split bytes, not text: a cut may go through a character, and `str.splitlines` also splits at characters in texts.
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, last], start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number > len(lines):
                return entries, [f"{path}: the last line is cut, perhaps because the run was killed. It is left out."]
            raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
        check_shape(entry, dict, f"{path}, line {number}")
        entries.append(entry)
    return entries, []


def check_shape(content: Any, shape: Shape, file: str, field: str = "") -> None:
    """
    Check the shape of decoded JSON.

    Args:
        content (`Any`): decoded JSON.
        shape (`Shape`): its required shape.
        file (`str`): the file's name, for the error.
        field (`str`, *optional*): the field's place in the file, for the error.

    Raises:
        ValueError: if the content has another type, or lacks a name.
    """
    kinds = shape if isinstance(shape, type | tuple) else dict
    if not isinstance(content, kinds):
        wanted = _WORDS[kinds[-1] if isinstance(kinds, tuple) else kinds]
        found = repr(content)
        found = found if len(found) <= 60 else f"{found[:60]}…"
        raise ValueError(f"{file}: {f'`{field}`' if field else 'the content'} must be {wanted}, got {found}.")
    if isinstance(shape, Each):
        for name, value in content.items():
            check_shape(value, shape.shape, file, _joined(field, name))
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            if name not in content:
                raise ValueError(
                    f"{file}: `{_joined(field, name)}` is missing: the file is of another version, or damaged."
                )
            check_shape(content[name], inner, file, _joined(field, name))


def _joined(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name
