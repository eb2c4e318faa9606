"""Turns questions into the columns that TRL trains on."""

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from PIL.Image import Image

from .columns import CONVERSATIONS, RESERVED_NAMES
from .formats import FORMATS, FormatName
from .geometry3k import GEOMETRY3K
from .question import IMAGE_PLACEHOLDER, BadRow, Question
from .templates import template_text


def question_prompt(question: Question, template: str, conversational: bool = True) -> dict[str, Any]:
    """
    Args:
        question ([`~sapo_trl.data.question.Question`]):
            The question.
        template (`str`):
            Text with `{problem}`.
        conversational (`bool`, *optional*, defaults to `True`):
            `False` for a plain-text prompt, for models without a chat template. It is ignored with pictures.

    Returns:
        `dict`: `prompt`, `answer`, and `images` if the data set has pictures. The prompt is one user message. With
        pictures its content is a list of blocks, with an image block for each `<image>`.

    Raises [`BadRow`] if the question or the answer is empty, or the placeholders do not match the pictures.
    """
    if not question.text.replace(IMAGE_PLACEHOLDER, "").strip():
        raise BadRow("empty prompt", f"the question is {question.text!r}")
    if not question.answer.strip():
        raise BadRow("empty answer", f"the answer is {question.answer!r}")
    text = template.replace("{problem}", question.text)
    columns: dict[str, Any] = {"answer": question.answer}
    if question.images is None:
        return {"prompt": [{"role": "user", "content": text}] if conversational else text, **columns}
    texts = text.split(IMAGE_PLACEHOLDER)
    if len(texts) - 1 != len(question.images):
        raise BadRow(
            "image count",
            f"{question.text!r} has {len(texts) - 1} {IMAGE_PLACEHOLDER} placeholders but {len(question.images)} "
            "images; one placeholder each is needed",
        )
    blocks = [{"type": "text", "text": texts[0]}]
    for text in texts[1:]:
        blocks += [{"type": "image"}, {"type": "text", "text": text}]
    content = [block for block in blocks if block.get("text") != ""]
    return {"prompt": [{"role": "user", "content": content}], "images": question.images, **columns}


def geometry_prompt(row: Mapping[str, Any], prompt_template: str = "none") -> dict[str, Any]:
    r"""
    Convert one row of Geometry3K, or of a data set with its columns.

    Args:
        row (`Mapping`):
            `images` (`list` of PIL images), `problem` (text with one `<image>` for each of them) and `answer` (text).
        prompt_template (`str`, *optional*, defaults to `"none"`):
            Name or text, see [`~sapo_trl.data.templates.template_text`]. The prompt may have to ask for a `\boxed{}`.

    Returns:
        `dict`: `prompt` (one user message, with an image block for each `<image>`), `images` and `answer`.
        Raises `ValueError` if a column is missing or empty, or the placeholders do not match the images.
    """
    check_columns(row, GEOMETRY3K.columns)
    return question_prompt(GEOMETRY3K.read(row), template_text(prompt_template))


def to_prompts(
    dataset: Dataset | IterableDataset, prompt_template: str = "none", dataset_format: FormatName = "geometry3k"
) -> Dataset | IterableDataset:
    """
    Convert a whole data set that has no bad rows. The first bad row is an error, and decoded pictures stay unchanged.
    [`~sapo_trl.data.clean_prompts`] also cleans and resizes, and reads files.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Data set with the columns of its format. Columns that the prompt does not replace stay.
        prompt_template (`str`, *optional*, defaults to `"none"`):
            Name or text, see [`~sapo_trl.data.templates.template_text`].
        dataset_format (`str`, *optional*, defaults to `"geometry3k"`):
            A name from [`~sapo_trl.data.formats.FORMATS`].
    """
    data_format, template = FORMATS[dataset_format], template_text(prompt_template)

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        check_columns(row, data_format.columns)
        return _check_decoded(question_prompt(data_format.read(row), template))

    if dataset.column_names is not None:  # an iterable data set may not know its columns before it is read
        check_columns(dataset.column_names, data_format.columns)
    return dataset.map(convert, remove_columns=list(data_format.consumed))


def _check_decoded(columns: dict[str, Any]) -> dict[str, Any]:
    """
    The columns, unchanged. Raises `ValueError` for pictures that are files or paths, because a processor would fail on
    them or fetch them.
    """
    files = [image for image in columns.get("images") or () if not isinstance(image, Image)]
    if files:
        raise ValueError(
            f"`images` must hold decoded pictures, got {repr(files[0])[:200]}. `clean_prompts` reads and checks "
            "files; `dataset.cast_column(name, List(Image()))` of the library `datasets` decodes them unchecked."
        )
    return columns


def check_names(columns: Iterable[str], has_images: bool) -> None:
    """Raises `ValueError` if one of the columns kept beside the prompt has a name that TRL reserves."""
    taken = {*RESERVED_NAMES, *(CONVERSATIONS if has_images else ())}
    wrong = [name for name in columns if name in taken]
    if wrong:
        raise ValueError(
            f"The data set has columns {wrong}, but TRL reserves these names. Rename or remove them, or name them in "
            "`columns` if they are the question or the answer."
        )


def check_columns(found: Iterable[str], needed: tuple[str, ...]) -> None:
    """Raises `ValueError` if a column is missing."""
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(
            f"Missing columns {missing}: the data set's format needs {list(needed)}, found {sorted(found)}. If your "
            "columns have other names, give these names in `columns`."
        )
