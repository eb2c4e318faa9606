"""The columns of data sets: a row's images, and the format of a data set whose columns are named."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from .question import DataFormat, Question, as_list, text_cell, with_placeholders


ROLES = ("problem", "answer", "images")
"""The roles that a column can have; pictures are optional."""

IMAGE_COLUMNS = ("images", "image")
"""The columns in which TRL looks for images, the first of them first."""


ANSWER_COLUMNS = ("answer", "solution")
"""The columns in which reward functions look for the right answer: ours, then TRL's."""


RESERVED_NAMES = (
    "prompts",
    "completions",
    "completion",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)
"""Arguments that TRL passes to reward functions itself. A column of the same name collides with it, or is lost."""


CONVERSATIONS = ("messages", "chosen", "rejected")
"""Columns that TRL takes, with pictures, as a sign that prompts are messages."""


def image_column(found: Collection[str]) -> str | None:
    """The name of the column with the images; `None` if there is no such column."""
    return next((name for name in IMAGE_COLUMNS if name in found), None)


def row_images(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row in TRL's form; empty if it has none."""
    return row.get("images") or ([row["image"]] if row.get("image") is not None else [])


def row_answer(row: Mapping[str, Any]) -> Any:
    """The right answer of a row; `None` if it has none."""
    return next((row[name] for name in ANSWER_COLUMNS if row.get(name) is not None), None)


def own_columns(found: Collection[str], names: Mapping[str, str] | None = None) -> DataFormat:
    """
    The format of a data set with named columns.

    Args:
        found (`Collection[str]`):
            Columns of the data set.
        names (`Mapping[str, str]`, *optional*):
            Maps `"problem"`, `"answer"` and `"images"` to columns. By default a role has the column of its own name;
            pictures may also be in a column `image`.

    Returns:
        [`DataFormat`]. Raises `ValueError` if a column does not exist.
    """
    names = dict(names or {})
    check_roles(names)
    pictures = image_column(found)
    chosen = {"problem": "problem", "answer": "answer", "images": pictures, **names}
    missing = [f"{role!r} ({name!r})" for role, name in chosen.items() if name is not None and name not in found]
    if missing:
        raise ValueError(
            f"No column for {' and '.join(missing)}: the data set has the columns {sorted(found)}. Name yours, for "
            "example `columns: {problem: question, answer: final, images: figure}`; or set `dataset_format`, if the "
            "data set is a copy of a known data set. A data set with a column `prompt` in TRL's form needs neither."
        )
    columns = tuple(name for name in chosen.values() if name is not None)
    # A reward function may know the answer by the user's name of its column. A reserved name cannot stay.
    kept = [name for name in (chosen["answer"],) if name not in RESERVED_NAMES + CONVERSATIONS]
    return DataFormat(
        columns=columns,
        read=partial(_read, chosen=chosen),
        consumed=tuple(name for name in columns if name not in ("answer", *kept)),  # the pass overwrites `answer`
        images=chosen["images"],
    )


def check_roles(names: Mapping[str, str]) -> None:
    """Raises `ValueError` for an unknown role."""
    unknown = sorted(set(names) - set(ROLES))
    if unknown:
        raise ValueError(f"`columns` names a column for {unknown}; it can name one for each of {list(ROLES)}.")


def _read(row: Mapping[str, Any], chosen: Mapping[str, str | None]) -> Question:
    text, answer = text_cell(row, chosen["problem"]), text_cell(row, chosen["answer"])
    if chosen["images"] is None:
        return Question(text, answer)
    images = as_list(row[chosen["images"]])
    return Question(with_placeholders(text, images), answer, images)
