"""Turns raw rows into prompts for training, in one pass: convert, check, resize, count."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from .columns import image_column
from .images import ImageLimits, fit_image
from .loading import undecoded
from .messages import OTHER_MEDIA, holds_blocks, take_images
from .placeholders import placeholders
from .prompts import check_columns, check_names, question_prompt
from .question import BadRow, DataFormat, as_list, is_missing
from .report import CleaningReport
from .templates import template_text


Processing = PreTrainedTokenizerBase | ProcessorMixin

# These columns carry the findings of the pass from the rows to the report. `map` may read rows from its cache without
# calling the function, so the function cannot fill the report itself.
_NOTES = Features(
    {
        "_row": Value("int64"),
        "_reason": Value("string"),
        "_detail": Value("string"),
        "_digest": Value("string"),
        "_sizes": List(List(Value("int64"))),
    }
)


def clean_prompts(
    dataset: Dataset | IterableDataset,
    data_format: DataFormat | None = None,
    *,
    prompt_template: str = "none",
    conversational: bool = True,
    limits: ImageLimits | None = None,
    folders: Sequence[Path] = (),
    processor: Processing | None = None,
    max_prompt_length: int | None = None,
    allow_remote_images: bool = False,
    strict: bool = False,
    name: str = "data",
) -> tuple[Dataset | IterableDataset, CleaningReport]:
    """
    Convert a data set to TRL's columns and leave out unusable rows.

    A row is unusable if it has no question or no answer; if a picture is missing, unreadable, empty, huge or narrow;
    if the number of pictures differs from the number of their places in the text; if it has a video or a sound; if its
    text contains the model's own placeholder; if its prompt is too long; or if it repeats an earlier row (same prompt,
    pictures and answer).

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows as loaded. Its features must be known.
        data_format ([`~sapo_trl.data.question.DataFormat`], *optional*):
            How a row is read. `None` for a data set with a column `prompt`. This column stays unchanged, but pictures
            in its messages move to the column `images`.
        prompt_template (`str`, *optional*, defaults to `"none"`):
            Name or text, see [`~sapo_trl.data.templates.template_text`].
        conversational (`bool`, *optional*, defaults to `True`):
            `False` for prompts of plain text; for data sets without pictures.
        limits ([`~sapo_trl.data.images.ImageLimits`], *optional*):
            Smallest and largest number of pixels. Pictures outside these limits are resized to them.
        folders (`Sequence[Path]`, *optional*):
            Folders to search for pictures with a relative path.
        processor (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Counts the tokens of a prompt, image tokens included, and knows the model's placeholders.
        max_prompt_length (`int`, *optional*):
            Largest number of tokens in a prompt. Needs `processor`.
        allow_remote_images (`bool`, *optional*, defaults to `False`):
            Fetch pictures from addresses (`http:` or `https:`). By default such pictures count as missing, so that
            rows cannot make this machine send requests.
        strict (`bool`, *optional*, defaults to `False`):
            Raise an error instead of leaving rows out. The error comes after the pass; in a stream, at the first bad
            row.
        name (`str`, *optional*, defaults to `"data"`):
            Name of the data set in the report and in errors.

    Returns:
        `tuple[Dataset | IterableDataset, CleaningReport]`: The data set has the columns `prompt`, `answer`, `images`
        if there are pictures, and all columns that the prompt did not replace, except other pictures. The report of a
        stream counts rows as they are read, and starts anew with each pass.

    Raises:
        ValueError: if a column is missing or has a name that TRL reserves, if no row is left, or, with `strict`, if a
            row is unusable.
    """
    if dataset.features is None:
        raise ValueError(f"The features of {name!r} must be known; `IterableDataset.cast` tells a stream its own.")
    if max_prompt_length is not None and processor is None:
        raise ValueError(f"`max_prompt_length={max_prompt_length}` needs a `processor` that counts tokens.")
    features = dict(dataset.features)
    if data_format is None:
        check_columns(features, ("prompt",))
        pictures = image_column(features)
    else:
        check_columns(features, data_format.columns)
        pictures = data_format.images
        if pictures is not None and not conversational:
            raise ValueError(f"`conversational=False` is for text; {name!r} has pictures, in {pictures!r}.")
    made = _made_features(data_format, features, pictures, conversational)
    dataset, of_media = undecoded(dataset)
    # Unchecked pictures are removed, so that nothing can decode them. TRL would also look for pictures in the columns
    # `image` and `images`.
    removed = {*of_media, *{"image", "images", *OTHER_MEDIA} & set(features)}
    removed |= set(data_format.consumed if data_format else ())
    stays = {column: feature for column, feature in features.items() if column not in removed | set(made)}
    check_names(stays, has_images="images" in made)
    prepare = _Preparation(
        data_format,
        pictures,
        tuple(made),
        template_text(prompt_template),
        conversational,
        limits or ImageLimits(),
        tuple(folders),
        processor,
        placeholders(processor),
        max_prompt_length,
        allow_remote_images,
    )
    settings = {
        "with_indices": True,
        "remove_columns": sorted(removed),
        "features": Features({**stays, **made, **_NOTES}),
    }
    report = CleaningReport(name)
    if isinstance(dataset, IterableDataset):
        sieve = _Sieve(report, strict)
        passed = dataset.map(prepare, **settings).filter(sieve, input_columns=list(_NOTES))
        return passed.remove_columns(list(_NOTES)), report

    # Files next to the data or on the network may have changed. `map`'s cache would not notice this.
    fresh = {"load_from_cache_file": False} if folders or allow_remote_images else {}
    mapped = dataset.map(prepare, **settings, **fresh, writer_batch_size=100, desc=f"Preparing {name}")
    sieve = _Sieve(report, strict=False)
    good = [row for row, notes in enumerate(mapped.select_columns(list(_NOTES))) if sieve(*notes.values())]
    if strict and report.bad:
        raise ValueError(
            f"{len(mapped) - len(good)} of {len(mapped)} rows of {name!r} cannot be used (strict=True). "
            f"{report.summary()}. Without `strict` they are left out."
        )
    if not good:
        raise ValueError(
            f"None of the {len(mapped)} rows of {name!r} can be used. {report.examples or 'It is empty'}."
        )
    kept = mapped.remove_columns(list(_NOTES))
    return (kept if len(good) == len(kept) else kept.select(good)), report


@dataclass(frozen=True)
class _Preparation:
    """Prepares one row. It is an object and not a closure, so that `map` can recognize it in its cache."""

    data_format: DataFormat | None
    pictures: str | None
    made: tuple[str, ...]
    template: str
    conversational: bool
    limits: ImageLimits
    folders: tuple[Path, ...]
    processor: Processing | None
    placeholders: tuple[str, ...]
    max_prompt_length: int | None
    allow_remote_images: bool
    version: int = 2
    """Raise this number if the preparation changes: `map`'s cache compares settings, not code."""

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        try:
            return {**self._columns(row), "_row": number, "_reason": None, "_detail": None}
        except BadRow as bad:
            blank = dict.fromkeys(self.made)
            notes = {"_row": number, "_reason": bad.reason, "_detail": bad.detail, "_digest": None, "_sizes": []}
            return {**blank, **notes}

    def _columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        unread = [column for column in OTHER_MEDIA if row.get(column)]
        if unread:
            raise BadRow("video or sound", f"a cell in the column {unread[0]!r}, which is not read")
        columns = self._given(row) if self.data_format is None else self._asked(row)
        prompt, answer, images = columns["prompt"], columns["answer"], columns.get("images")
        written = [token for token in self.placeholders if token in _text_of(prompt)]
        if written:
            raise BadRow("placeholder in text", f"the text has {written[0]!r}, which stands for a piece of a picture")
        fitted = [fit_image(image, self.limits, self.folders, self.allow_remote_images) for image in images or ()]
        _check_places(prompt, images)
        if images is not None:
            columns["images"] = [{"bytes": image.data, "path": None} for image in fitted]
        if self.max_prompt_length is not None:
            tokens = count_tokens(self.processor, prompt, [Image.open(io.BytesIO(image.data)) for image in fitted])
            if tokens > self.max_prompt_length:
                raise BadRow("long prompt", f"{tokens} tokens, more than max_prompt_length={self.max_prompt_length}")
        digest = hashlib.blake2b(json.dumps([prompt, str(answer)], default=str).encode(), digest_size=16)
        for image in fitted:
            digest.update(hashlib.blake2b(image.source).digest())
        sizes = [[*image.before, *image.after] for image in fitted]
        return {**{name: columns[name] for name in self.made}, "_digest": digest.hexdigest(), "_sizes": sizes}

    def _asked(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return question_prompt(self.data_format.read(row), self.template, self.conversational)

    def _given(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a row in TRL's form, with all its pictures in `images`."""
        prompt, answer = row["prompt"], row.get("answer", "unknown")
        columns = {"prompt": prompt, "answer": answer}
        if self.pictures is not None:
            columns["images"] = as_list(row[self.pictures])
        if "prompt" in self.made and prompt is not None:
            columns["prompt"], columns["images"] = take_images(prompt, columns.get("images", []))
        if not _text_of(columns["prompt"]).strip():
            raise BadRow("empty prompt", f"the prompt is {prompt!r}")
        if is_missing(answer):
            raise BadRow("empty answer", f"the answer is {answer!r}")
        return columns


class _Sieve:
    """Decides which rows of one pass stay, and fills the report."""

    def __init__(self, report: CleaningReport, strict: bool):
        self.report = report
        self.strict = strict
        self.seen: dict[str, int] = {}

    def __call__(self, row: int, reason: str | None, detail: str | None, digest: str | None, sizes: list) -> bool:
        if row == 0:  # a stream is read anew
            self.report.clear()
            self.seen.clear()
        if reason is None and digest in self.seen:
            reason, detail = "duplicate", f"the same as row {self.seen[digest]}"
        if reason is None:
            self.seen[digest] = row
            self.report.add_good(sizes)
            return True
        if self.strict:
            raise ValueError(f"Row {row} of {self.report.name!r} cannot be used (strict=True). {reason}: {detail}.")
        self.report.add_bad(row, reason, detail)
        return False


def count_tokens(processor: Processing, prompt: str | list[dict[str, Any]], images: Sequence[Image.Image] = ()) -> int:
    """
    Number of tokens of a prompt, image tokens included. The prompt is encoded as in the trainer.

    Args:
        processor (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            The model's processor.
        prompt (`str` or `list[dict]`):
            Text, or messages.
        images (`Sequence[PIL.Image.Image]`, *optional*):
            Pictures of the messages.
    """
    if isinstance(prompt, str):
        return len(getattr(processor, "tokenizer", processor)(prompt)["input_ids"])
    if isinstance(processor, ProcessorMixin):
        prompt = prepare_multimodal_messages(prompt, list(images))
    encoded = processor.apply_chat_template([prompt], add_generation_prompt=True, tokenize=True, return_dict=True)
    return len(encoded["input_ids"][0])


def _check_places(prompt: str | list[dict[str, Any]], images: list[Any] | None) -> None:
    """Check the number of places for pictures, with the function with which TRL puts pictures into a prompt."""
    if images is None or (not images and isinstance(prompt, str)):
        return
    if isinstance(prompt, str):
        raise BadRow("image count", "a prompt of plain text has no place for pictures; write it as messages")
    try:
        prepare_multimodal_messages(prompt, images)
    except ValueError as error:
        raise BadRow("image count", str(error)) from error


def _text_of(prompt: str | list[dict[str, Any]] | None) -> str:
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    contents = [message.get("content") for message in prompt]
    return "".join(
        content if isinstance(content, str) else "".join(block.get("text") or "" for block in content or ())
        for content in contents
    )


def _made_features(
    data_format: DataFormat | None, found: Mapping[str, Any], pictures: str | None, conversational: bool
) -> dict[str, Any]:
    """Features of the columns that the pass creates."""
    made: dict[str, Any] = {}
    given_blocks = data_format is None and holds_blocks(found["prompt"])
    if given_blocks:
        made["prompt"] = List(Json())  # of messages
    if data_format is not None:
        # JSON, because an image block has no `text`.
        content = Value("string") if pictures is None else List(Json())
        made["prompt"] = List({"role": Value("string"), "content": content}) if conversational else Value("string")
        made["answer"] = Value("string")
    if pictures is not None or given_blocks:
        made["images"] = List(ImageFeature())
    return made
