"""From rows of (`images`, `problem`, `answer`), as `hiyouga/geometry3k` has them, to the columns TRL trains on."""

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset


REQUIRED_COLUMNS = ("images", "problem", "answer")
IMAGE_PLACEHOLDER = "<image>"


def geometry_prompt(row: Mapping[str, Any], instruction: str | None = None) -> dict[str, Any]:
    r"""
    Convert one row.

    Args:
        row (`Mapping`):
            `images` (`list` of PIL images), `problem` (text with one `<image>` for each of them) and `answer` (text).
        instruction (`str`, *optional*):
            Appended to the question, for models that have to be told to end with a `\boxed{}`.

    Returns:
        `dict`: `prompt` (one user message, with an image block where `<image>` was), `images` and `answer`.
        Raises `ValueError` if a column is missing or the placeholders do not match the images.
    """
    _check_columns(row)
    images = list(row["images"] or ())
    texts = row["problem"].split(IMAGE_PLACEHOLDER)
    if len(texts) - 1 != len(images):
        raise ValueError(
            f"The problem {row['problem']!r} has {len(texts) - 1} {IMAGE_PLACEHOLDER} placeholders but {len(images)} "
            "images; one placeholder each is needed."
        )
    if instruction:
        texts[-1] = f"{texts[-1]} {instruction}"
    blocks = [{"type": "text", "text": texts[0]}]
    for text in texts[1:]:
        blocks += [{"type": "image"}, {"type": "text", "text": text}]
    content = [block for block in blocks if block.get("text") != ""]
    return {"prompt": [{"role": "user", "content": content}], "images": images, "answer": row["answer"]}


def to_prompts(dataset: Dataset | IterableDataset, instruction: str | None = None) -> Dataset | IterableDataset:
    """
    Convert a whole data set; every other column but `problem` stays.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Data set with the columns that [`geometry_prompt`] needs.
        instruction (`str`, *optional*):
            Passed to [`geometry_prompt`].
    """
    if dataset.column_names is not None:  # an iterable data set may not know them before it is read
        _check_columns(dataset.column_names)
    return dataset.map(geometry_prompt, fn_kwargs={"instruction": instruction}, remove_columns=["problem"])


def _check_columns(columns: Iterable[str]) -> None:
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"Missing columns {missing}: a geometry data set needs {list(REQUIRED_COLUMNS)}, found {sorted(columns)}."
        )
