"""Reads all that a run has recorded, for its page: responses, their prompts and images, values, and the log."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ..json_files import read_json
from .columns import (
    ANYTHING,
    INTEGER,
    NUMBER,
    NUMBERS_OF_SOME_RUNS,
    NUMBERS_OF_TOKENS,
    OPTIONAL_NUMBERS,
    RATIO_COLUMNS,
    RESPONSE_COLUMNS,
    REWARD_COLUMNS,
    SETTINGS_FILE,
    SETTINGS_SHAPE,
    TOKEN_COLUMNS,
    VALUE_COLUMNS,
    Kind,
)
from .log import read_log
from .tables import read_frame, recorded_files


NUMBER_COLUMNS = (*NUMBERS_OF_TOKENS, *NUMBERS_OF_SOME_RUNS, "log_ratios")
"""Numbers of each token that a run may have recorded."""

_WRITER = "SegmentationCallback"
_HOW_TO_RECORD = (
    "To record them, add `--record_every 1` to `sapo-trl train`; in Python, pass "
    f'`callbacks=[{_WRITER}("RUN/segments")]` to the trainer. Then train again.'
)
_HOW_TO_LOG = "`sapo-trl train` saves one at its end; in Python, call `trainer.save_state()` after training."
# Of an image. A small file can hold more than the memory of this machine.
_MAX_PIXELS = 4096**2
_RESPONSE_COLUMNS = {name: kind for name, kind in RESPONSE_COLUMNS.items() if name != "step"}
_IMAGES = ("images", "corrupted_images")
_OPTIONAL_LISTS = ("special", "masked_tokens", "masked_positions", *_IMAGES, *REWARD_COLUMNS)
_STATE_COLUMNS = {name: VALUE_COLUMNS[name] for name in ("response", "token", "monte_carlo_value", "standard_error")}
# Form of the special tokens of the usual tokenizers, for files that were written before `special` was recorded.
_SPECIAL_LOOKS = re.compile(r"<\|[^|<>]+\|>|<[｜|].+[｜|]>|</?s>|<(bos|eos|pad|unk|start_of_turn|end_of_turn)>")


@dataclass
class Recording:
    """
    One run.

    Args:
        name (`str`): what to call it.
        responses (`pd.DataFrame`):
            one row per response: `step`, `process`, `response` (its place in the rollout), `reward` (NaN if
            unscored), `prompt`, `images` (list of paths), and with one entry per loss token `tokens`, `special`,
            `segment_ids` and [`NUMBER_COLUMNS`] (NaN where not recorded); `masked_tokens` and `masked_positions` are
            the tokens of no segment, each with the number of loss tokens before it. `corrupted_images` are paths
            like `images`. `answer` is `None` where not recorded; `reward_names`, `reward_weights` and `reward_values`
            (`None` if unscored) are empty there.
        log (`pd.DataFrame`): one row per entry of the log; empty without any.
        state_values (`pd.DataFrame`):
            [`~sapo_trl.ValueDiagnostics`]' Monte-Carlo values: `step`, `process`, `response`, `token`,
            `monte_carlo_value`, `standard_error`.
        notes (`list[str]`): remarks for the reader on missing data and the reasons.
        settings (`dict`, *optional*): the algorithm and its settings, as
            [`~sapo_trl.recordings.columns.SETTINGS_SHAPE`] describes them; `None` where not recorded.
    """

    name: str
    responses: pd.DataFrame
    log: pd.DataFrame
    state_values: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] | None = None


def read_recording(folder: str | Path, name: str | None = None) -> Recording:
    """
    Read a run.

    Args:
        folder (`str` or `Path`):
            with a [`~sapo_trl.SegmentationCallback`]'s files, or else with TRL's completions tables, in it or below
            it; and with a log (see [`~sapo_trl.analysis.read_log_history`]).
        name (`str`, *optional*): what to call it; by default the folder's name.

    Returns:
        [`Recording`]

    Raises:
        ValueError: if there is neither a response nor a log, or a file cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder.")
    notes: list[str] = []
    log = _read_log(folder, notes)
    if _has(folder, "segments"):
        responses = _read_segments(folder, notes)
    elif tables := sorted(folder.rglob("completions_*.parquet")):
        responses = pd.concat([_read_completions(path, log, notes) for path in tables], ignore_index=True)
        notes.append(f"These are TRL's completions tables, without tokens or segments. {_HOW_TO_RECORD}")
    elif log.empty:
        raise ValueError(f"{folder}: neither responses nor a log. {_HOW_TO_RECORD} {_HOW_TO_LOG}")
    else:
        responses = _table([])
        notes.append(f"No responses were recorded. {_HOW_TO_RECORD}")
    if log.empty:
        notes.append(f"No log was found, so there are no learning curves. {_HOW_TO_LOG}")
    values, settings = _read_state_values(folder, notes), _read_settings(folder)
    return Recording(name or folder.resolve().name, responses, log, values, notes, settings)


def run_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(each[-1:])} ({number})" for number, each in enumerate(parts, start=1)]


def _has(folder: Path, kind: str) -> bool:
    return any(path.suffix in (".parquet", ".json") for path in folder.rglob(f"{kind}_*_*.*"))


def _read_log(folder: Path, notes: list[str]) -> pd.DataFrame:
    # Of no log at all there is no error: the responses can be looked at without.
    found = [*folder.glob("trainer_state.json"), *folder.glob("checkpoint-*/trainer_state.json")]
    if not found and len(list(folder.glob("*.jsonl"))) != 1:
        return pd.DataFrame()
    log, cut = read_log(folder)
    notes += cut
    return log


def _read_settings(folder: Path) -> dict[str, Any] | None:
    if not _has(folder, "segments"):
        return None
    path = recorded_files(folder, "segments", ("parquet", "json"), _WRITER)[0][0].with_name(SETTINGS_FILE)
    return read_json(path, SETTINGS_SHAPE) if path.is_file() else None


def _read(path: Path, columns: dict[str, Kind], notes: list[str]) -> pd.DataFrame:
    frame, cut = read_frame(path, columns)
    notes += cut
    return frame


def _read_segments(folder: Path, notes: list[str]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    files = recorded_files(folder, "segments", ("parquet", "json"), _WRITER)
    images = _Images(files[0][0].parent)
    missing_ratios = 0
    for path, step, process in files:
        frame = _read(path, _RESPONSE_COLUMNS, notes)
        ratios = _read_ratios(path.with_name(path.name.replace("segments_", "ratios_", 1)), notes)
        for place, row in enumerate(frame.to_dict("records")):
            number = len(row["tokens"])
            for name in OPTIONAL_NUMBERS:
                if not hasattr(row.get(name), "__len__"):  # not asked for, or of an earlier version
                    row[name] = np.full(number, np.nan)
            if uneven := {name: len(row[name]) for name in TOKEN_COLUMNS if len(row[name]) != number}:
                raise ValueError(f"{path}: response {place} has {number} `tokens`, but {uneven}.")
            row["log_ratios"] = ratios.get(place)
            if row["log_ratios"] is None or len(row["log_ratios"]) != number:
                missing_ratios += number > 0
                row["log_ratios"] = np.full(number, np.nan)
            for name in _OPTIONAL_LISTS:
                if not hasattr(row.get(name), "__len__"):  # of an earlier version, or empty beside rows that are not
                    row[name] = None
            if row["special"] is None:
                row["special"] = [_SPECIAL_LOOKS.fullmatch(token) is not None for token in row["tokens"]]
            _check_masked(path, place, row)
            _check_rewards(path, place, row)
            row["answer"] = row["answer"] if isinstance(row.get("answer"), str) else None
            for name in _IMAGES:
                row[name] = images.found(row[name])
            rows.append({**row, "step": step, "process": process, "response": place})
    notes += images.notes()
    if missing_ratios:
        notes.append(
            f"{missing_ratios} responses have no importance ratios: the run ended before the policy was run on them "
            "again, its loss is TRL's own, or they were recorded by an earlier version."
        )
    table = _table(rows)
    if len(table) and not any(np.any(values) for values in table["values"]):
        # Zeros are recorded without a critic.
        table["values"] = [np.full(len(values), np.nan) for values in table["values"]]
        notes.append("The run had no values.")
    return table


def _check_masked(path: Path, place: int, row: dict[str, Any]) -> None:
    """Raise unless all lists of a response that are beside its loss tokens fit to one another."""
    number, tokens, positions = len(row["tokens"]), row["masked_tokens"], row["masked_positions"]
    if len(row["special"]) != number:
        raise ValueError(f"{path}: response {place} has {number} `tokens`, but {len(row['special'])} `special`.")
    if (0 if tokens is None else len(tokens)) != (0 if positions is None else len(positions)):
        raise ValueError(f"{path}: response {place} must have a `masked_positions` for each of its `masked_tokens`.")
    if positions is not None and len(positions) and not 0 <= min(positions) <= max(positions) <= number:
        raise ValueError(f"{path}: response {place} has `masked_positions` beyond its {number} `tokens`.")


def _check_rewards(path: Path, place: int, row: dict[str, Any]) -> None:
    lengths = {name: 0 if row[name] is None else len(row[name]) for name in REWARD_COLUMNS}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path}: response {place} must have one entry per reward function in each list: {lengths}.")


class _Images:
    """
    The image files of a recording.

    A recording may be someone else's, and its page may be shown to others: no name in it may bring another file of
    this machine into the page. So only PNG files in the folder `images` are taken, by their bare names, and no links.

    Args:
        folder (`Path`): with the recorded files, and `images`.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "images"
        self._place = folder.resolve() / "images"
        self._files: dict[str, Path | None] = {}
        self._missing: list[str] = []
        self._refused: list[str] = []

    def found(self, names: Sequence[str] | None) -> list[Path]:
        """Paths of the files with these names, without names that are refused or missing."""
        paths = []
        for name in [] if names is None else names:
            if name not in self._files:
                self._files[name] = self._find(name)
            paths.append(self._files[name])
        return [path for path in paths if path is not None]

    def notes(self) -> list[str]:
        """Notes on images that were left out."""
        notes = []
        if self._missing:
            notes.append(f"{len(self._missing)} images are not where they were recorded ({self.folder}).")
        if self._refused:
            notes.append(
                f"{len(self._refused)} images are left out, such as {min(self._refused)!r}: each must be a PNG file "
                f"in {self.folder}, named by its name alone, no link, and of {_MAX_PIXELS:,} pixels at most."
            )
        return notes

    def _find(self, name: str) -> Path | None:
        path = self.folder / name
        try:
            if path.resolve() == self._place / name and path.name == name:
                if not path.is_file():
                    self._missing.append(name)
                    return None
                with Image.open(path, formats=["PNG"]) as image:
                    if image.width * image.height <= _MAX_PIXELS:
                        image.load()
                        return path
        except Exception:  # of any kind: nobody here has written the file, or its name
            pass
        self._refused.append(name)
        return None


def _read_ratios(path: Path, notes: list[str]) -> dict[int, Any]:
    if not path.is_file():
        return {}
    frame = _read(path, RATIO_COLUMNS, notes)
    return dict(zip(frame["response"].tolist(), frame["log_ratios"], strict=True))


def _read_state_values(folder: Path, notes: list[str]) -> pd.DataFrame:
    if not _has(folder, "values"):
        return pd.DataFrame(columns=["step", "process", *_STATE_COLUMNS])
    files = recorded_files(folder, "values", ("parquet",), "ValueDiagnostics")
    frames = [_read(path, _STATE_COLUMNS, notes).assign(step=step, process=process) for path, step, process in files]
    return pd.concat(frames, ignore_index=True)[["step", "process", *_STATE_COLUMNS]]


def _read_completions(path: Path, log: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    frame = _read(path, {"step": INTEGER, "prompt": ANYTHING, "completion": ANYTHING, "advantage": NUMBER}, notes)
    # Other logged columns may stand beside the rewards.
    numeric = [name for name in frame if pd.api.types.is_numeric_dtype(frame[name])]
    rewards = [name for name in numeric if f"rewards/{name}/mean" in log]
    if not rewards:
        rewards = [name for name in numeric if name not in ("step", "advantage")]
    frame["reward"] = frame[rewards].sum(axis=1, min_count=1)
    rows = []
    for place, row in enumerate(frame.to_dict("records")):
        nothing = [np.nan]
        rows.append(
            {
                "step": row["step"],
                "process": 0,
                "response": place,
                "reward": row["reward"],
                "prompt": _message_text(row["prompt"]),
                "tokens": [_message_text(row["completion"])],
                "special": [False],
                "segment_ids": [0],
                **dict.fromkeys(NUMBER_COLUMNS, nothing),
                "advantages": [row["advantage"]],
            }
        )
    return _table(rows)


def _message_text(messages: Any) -> str:
    """Plain text of a prompt or completion: of a string itself, of a conversation each role and its content."""
    if isinstance(messages, str):
        return messages
    if not hasattr(messages, "__len__") or not all(isinstance(message, dict) for message in messages):
        return json.dumps(messages, ensure_ascii=False, default=str)
    texts = []
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str):
            parts = content if hasattr(content, "__len__") else []
            content = "".join(part.get("text") or f"[{part.get('type')}]" for part in parts if isinstance(part, dict))
        texts.append(content if len(messages) == 1 else f"{message.get('role')}: {content}")
    return "\n".join(texts)


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    scalars = ("step", "process", "response", "reward", "prompt")
    lists = ("tokens", "segment_ids", *NUMBER_COLUMNS, *_OPTIONAL_LISTS)
    table = pd.DataFrame({name: [row[name] for row in rows] for name in scalars})
    table["answer"] = pd.Series([row.get("answer") for row in rows], dtype=object)
    for name in lists:
        cells = (row.get(name) for row in rows)
        cells = [list(cell) if hasattr(cell, "__len__") else [] for cell in cells]
        if name in NUMBER_COLUMNS:
            cells = [np.asarray(cell, dtype=np.float64) for cell in cells]
        table[name] = pd.Series(cells, dtype=object)
    return table.assign(reward=table["reward"].astype(float))
