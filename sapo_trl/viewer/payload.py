"""
The data of the page: small things as JSON, and each token's numbers as columns of bytes.

A million tokens with six numbers each would be 40 MB of text and seconds of parsing. As float16 (three digits) behind
gzip they are about a third of that, and a browser reads them in place.
"""

from __future__ import annotations

import base64
import gzip
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ..foreign_text import visible
from ..recordings.run import NUMBER_COLUMNS, Recording
from .cuts import RecordedVocabulary, cut_marks


IMAGE_BYTES = 8 * 2**20
"""Limit on the size of all images of a page; beyond it they are shrunk."""

_IMAGE_SIDES = (256, 192, 128, 96, 64)
_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)
# `<|image_pad|>` a thousand times says no more than once.
_REPEATED = re.compile(r"(<\|[^|<>]+\|>)\1{2,}")


@dataclass
class Payload:
    """
    Args:
        meta (`dict`): for JSON: everything but the tokens.
        tokens (`str`): base64 of gzip of the columns that `meta["columns"]` describes.
    """

    meta: dict[str, Any]
    tokens: str


def build_payload(recordings: Sequence[Recording], max_tokens: int) -> Payload:
    """
    Pack one run or two.

    Args:
        recordings (`Sequence[Recording]`): the runs.
        max_tokens (`int`):
            about how many tokens to take; of more, responses are taken at even distances through each run.

    Returns:
        [`Payload`]
    """
    recordings, notes = _thinned(recordings, max_tokens)
    responses = pd.concat(
        [recording.responses.assign(run=run) for run, recording in enumerate(recordings)], ignore_index=True
    )
    vocabulary, loss_ids, masked_ids = _vocabulary(responses)
    segmenters, marks = cut_marks(responses, loss_ids, vocabulary)

    at = [np.asarray(positions, dtype=np.int64) for positions in responses["masked_positions"]]
    ids = _merged(loss_ids, at, masked_ids)
    columns: dict[str, np.ndarray] = {"token": ids.astype(np.min_scalar_type(max(len(vocabulary), 256)))}
    scales, ranges = {}, {}
    for name in NUMBER_COLUMNS:
        numbers = _merged(responses[name], at, np.nan).astype(np.float64)
        if np.isfinite(numbers).any():
            ranges[name] = _range(numbers)
            scales[name], columns[name] = _as_float16(numbers)
    columns["marks"] = _merged(marks, at, 0).astype(np.uint8)
    columns["masked"] = _merged([np.zeros(len(ids)) for ids in loss_ids], at, 1).astype(np.uint8)

    prompts, prompt_index, corrupted, images, image_notes = _prompts(responses)
    meta = {
        "runs": [visible(recording.name) for recording in recordings],
        "notes": [
            *(visible(note) for recording in recordings for note in _named(recording, recordings)),
            *notes,
            *image_notes,
        ],
        "settings": [_settings(recording) for recording in recordings],
        "curves": _curves([recording.log for recording in recordings]),
        "prompts": prompts,
        "images": images,
        "vocabulary": [visible(text) for text in vocabulary.texts],
        "special": vocabulary.all_special_ids,
        "segmenters": segmenters,
        "columns": _layout(columns, scales),
        "ranges": ranges,
        "responses": {
            **{name: responses[name].tolist() for name in ("run", "step", "process", "response")},
            "reward": [_finite(reward) for reward in responses["reward"]],
            "prompt": prompt_index,
            "corrupted": corrupted,
            "answer": [None if answer is None else visible(answer) for answer in responses["answer"]],
            "rewards": _rewards_per_function(responses),
            "length": [len(ids) + len(positions) for ids, positions in zip(loss_ids, at, strict=True)],
        },
        "monte_carlo": _monte_carlo(responses, recordings),
    }
    raw = b"".join(column.tobytes() for column in columns.values())
    return Payload(meta, base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0)).decode())


def _thinned(recordings: Sequence[Recording], max_tokens: int) -> tuple[list[Recording], list[str]]:
    tokens = sum(int(recording.responses["tokens"].map(len).sum()) for recording in recordings)
    share = max_tokens / max(tokens, 1)
    if share >= 1:
        return list(recordings), []
    thinned, before, after = [], 0, 0
    for recording in recordings:
        number = len(recording.responses)
        rows = np.unique(np.linspace(0, number - 1, max(1, int(number * share))).astype(int)) if number else []
        responses = recording.responses.iloc[rows].reset_index(drop=True)
        thinned.append(replace(recording, responses=responses))
        before, after = before + number, after + len(responses)
    return thinned, [
        f"{after:,} of {before:,} recorded responses are on this page, at even distances; `--max_tokens` takes more."
    ]


def _vocabulary(responses: pd.DataFrame) -> tuple[RecordedVocabulary, list[np.ndarray], list[np.ndarray]]:
    """Different texts, ids of the loss tokens of each response, and ids of its other tokens."""
    index: dict[tuple[str, bool], int] = {}
    loss_ids, masked_ids = [], []
    for row in responses[["tokens", "special", "masked_tokens"]].itertuples(index=False):
        keys = zip(row.tokens, row.special, strict=True)
        loss_ids.append(np.array([index.setdefault((text, bool(flag)), len(index)) for text, flag in keys], dtype=int))
        texts = [index.setdefault((text, False), len(index)) for text in row.masked_tokens]
        masked_ids.append(np.array(texts, dtype=int))
    return RecordedVocabulary([text for text, _ in index], [flag for _, flag in index]), loss_ids, masked_ids


def _merged(rows: Sequence, at: list[np.ndarray], inserted: Any) -> np.ndarray:
    """The rows one after the other, with the other tokens' entries inserted where those tokens are."""
    fillings = inserted if isinstance(inserted, list) else [inserted] * len(at)
    merged = [
        np.insert(np.asarray(row), positions, filling) if len(positions) else np.asarray(row)
        for row, positions, filling in zip(rows, at, fillings, strict=True)
    ]
    return np.concatenate([np.zeros(0), *merged])


def _as_float16(numbers: np.ndarray) -> tuple[float, np.ndarray]:
    """Numbers divided by a power of two that brings the largest into float16's range, and that power."""
    finite = np.abs(numbers[np.isfinite(numbers)])
    exponent = max(0.0, np.ceil(np.log2(max(finite.max(), 1e-30) / _LARGEST_FLOAT16)))
    scale = 2.0**exponent
    return scale, (numbers / scale).astype(np.float16)


def _range(numbers: np.ndarray) -> list[float]:
    """Smallest, 1st, 99th percentile and largest value: the ranges of colours and axes."""
    finite = numbers[np.isfinite(numbers)]
    return [float(f"{number:.4g}") for number in np.percentile(finite, [0, 1, 99, 100])]


def _layout(columns: dict[str, np.ndarray], scales: dict[str, float]) -> list[dict[str, Any]]:
    # The widest first, so that each column starts at a multiple of its width.
    layout, offset = [], 0
    for name, column in columns.items():
        layout.append({"name": name, "type": column.dtype.str[1:], "offset": offset, "scale": scales.get(name, 1.0)})
        offset += column.nbytes
    return layout


def _prompts(
    responses: pd.DataFrame,
) -> tuple[list[dict[str, Any]], list[int], list[list[int]], list[str], list[str]]:
    """
    Different prompts, the prompt of each response, its corrupted images (their places among all images), the images
    as `data:` addresses, and notes about them.
    """
    index: dict[tuple[str, tuple[str, ...]], int] = {}
    paths: dict[str, Path] = {}
    of_response = []
    for text, files, corrupted in responses[["prompt", "images", "corrupted_images"]].itertuples(index=False):
        text = _REPEATED.sub(lambda match: f"{match[1]} ×{len(match[0]) // len(match[1])} ", text)
        # Files are named by their content: the same image of another run has the same name.
        paths.update({path.name: path for path in [*files, *corrupted]})
        of_response.append(index.setdefault((text, tuple(path.name for path in files)), len(index)))
    place = {name: number for number, name in enumerate(paths)}
    prompts = [{"text": visible(text), "images": [place[name] for name in names]} for text, names in index]
    corrupted_images = [[place[path.name] for path in files] for files in responses["corrupted_images"]]
    images, notes = _embedded(list(paths.values()))
    return prompts, of_response, corrupted_images, images, notes


def _embedded(paths: list[Path]) -> tuple[list[str], list[str]]:
    files = [path.read_bytes() for path in paths]
    if sum(map(len, files)) <= IMAGE_BYTES:
        return [_data_address(data, "png") for data in files], []
    for side in _IMAGE_SIDES:
        shrunk = []
        for data in files:
            with Image.open(io.BytesIO(data)) as image:
                image.thumbnail((side, side))
                written = io.BytesIO()
                image.save(written, format="WEBP", quality=80)
            shrunk.append(written.getvalue())
        if sum(map(len, shrunk)) <= IMAGE_BYTES:
            break
    return [_data_address(data, "webp") for data in shrunk], [f"Images are shrunk to {side} pixels and compressed."]


def _data_address(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _settings(recording: Recording) -> dict[str, Any] | None:
    """The algorithm of a run and its changed settings, as texts; `None` where not recorded."""
    if recording.settings is None:
        return None
    settings = recording.settings
    corruption = settings["image_corruption"]
    if corruption == "tokens":
        corruption = f"{settings.get('image_corruption_share')} of its visual tokens are hidden"
    return {
        **{name: visible(settings[name]) for name in ("preset", "summary", "critic", "value_state")},
        **{
            name: [[visible(setting), visible(str(value))] for setting, value in settings[name].items()]
            for name in ("differences", "other_settings")
        },
        "corruption": visible(corruption.replace("_", " ")),
        "whitened": settings["whiten_advantages"],
    }


def _rewards_per_function(responses: pd.DataFrame) -> list[list[list[Any]]]:
    """For each response, name, value and weight of each reward function."""
    columns = responses[["reward_names", "reward_values", "reward_weights"]].itertuples(index=False)
    return [
        [
            [visible(name), None if value is None else _finite(value), _finite(weight)]
            for name, value, weight in zip(*response, strict=True)
        ]
        for response in columns
    ]


def _curves(logs: Sequence[pd.DataFrame]) -> list[dict[str, list[list[float]]]]:
    """
    For each run, steps and numbers of each metric. If some metric was logged at two steps or more, the page has
    curves, and metrics without a curve are left out.
    """
    curves: list[dict[str, list[list[float]]]] = [{} for _ in logs]
    for run, log in enumerate(logs):
        names = set(log.select_dtypes("number").columns) if "step" in log else set()
        for name in sorted(names - {"step"}):
            known = log[["step", name]][np.isfinite(log["step"]) & np.isfinite(log[name])]
            if len(known):
                numbers = [float(f"{number:.5g}") for number in known[name]]
                curves[run][visible(str(name))] = [known["step"].tolist(), numbers]
    long = {name for of_run in curves for name, (steps, _) in of_run.items() if len(set(steps)) > 1}
    if long - {"epoch"}:
        curves = [{name: curve for name, curve in of_run.items() if name in long} for of_run in curves]
    return curves


def _monte_carlo(responses: pd.DataFrame, recordings: Sequence[Recording]) -> dict[int, list[list[float | None]]]:
    """By response: token, Monte-Carlo value and standard error of each state that was valued."""
    keys = ["run", "step", "process", "response"]
    values = pd.concat(
        [recording.state_values.assign(run=run) for run, recording in enumerate(recordings)], ignore_index=True
    ).dropna(subset=["monte_carlo_value"])
    places = responses.reset_index(names="row")[["row", *keys]]
    found = places.merge(values.astype(dict.fromkeys(keys, "int64")), on=keys)
    return {
        int(row): [
            [int(token), float(f"{value:.4g}"), _finite(error, 3)]
            for token, value, error in zip(
                states["token"], states["monte_carlo_value"], states["standard_error"], strict=True
            )
        ]
        for row, states in found.groupby("row")
    }


def _named(recording: Recording, recordings: Sequence[Recording]) -> list[str]:
    return [note if len(recordings) == 1 else f"{recording.name}: {note}" for note in recording.notes]


def _finite(number: float, digits: int = 6) -> float | None:
    return float(f"{number:.{digits}g}") if np.isfinite(number) else None
