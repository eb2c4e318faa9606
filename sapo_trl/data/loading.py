"""Rows from the hub or from files."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, Json, load_dataset
from datasets.data_files import DataFilesDict, get_data_patterns
from PIL import Image

from .csv_types import csv_options


BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
"""The reader for each file ending. No reader runs code from the data, and none unpickles."""

_IMAGE_FOLDER = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def load_rows(
    name: str, config: str | None = None, split: str = "train", streaming: bool = False
) -> tuple[Dataset | IterableDataset, tuple[Path, ...]]:
    """
    Load one split.

    Args:
        name (`str`):
            A hub id, a file or a folder. The rows of a file (`.parquet`, `.jsonl`, `.json`, `.csv`, `.tsv`) are the
            split `"train"`. A folder has either such files, with their split in their names, or pictures with a
            `metadata.jsonl` or `.csv` (an ImageFolder).
        config (`str`, *optional*):
            Configuration, if the data set has several.
        split (`str`, *optional*, defaults to `"train"`):
            A split, or a slice of a split such as `"train[:90%]"`.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows one by one instead of all at once. Slices cannot be streamed.

    Returns:
        `tuple[Dataset | IterableDataset, tuple[Path, ...]]`: the rows, and the folders to which paths in the rows are
        relative. A hub id has no such folders.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if a file has another ending or no rows, if two files of a folder differ only in their endings,
            or if the split does not exist.
    """
    path = Path(name).expanduser()
    arguments: dict[str, Any] = {"path": name, "name": config}
    folders: tuple[Path, ...] = ()
    is_picture_table = False
    if path.is_file():
        arguments = file_arguments({"train": [str(path)]})
        folders = (path.resolve().parent,)
    elif path.is_dir():
        tables, beside_pictures = _tables(path)
        if not _names_its_files(path):
            _check_twins(name, tables)
        folders = tuple(sorted({table.resolve().parent for table in tables})) or (path.resolve(),)
        suffix = Counter(table.suffix for table in tables).most_common(1)[0][0] if tables else ""
        is_csv = BUILDERS.get(suffix) == "csv"
        is_image_folder = beside_pictures and any(table.name in _IMAGE_FOLDER for table in tables)
        # In a `metadata.csv`, `imagefolder` reads `NA` as missing and `007` as 7. So the file is read as a table.
        is_picture_table = is_image_folder and is_csv
        if is_image_folder and not is_csv:
            arguments = {"path": "imagefolder", "data_dir": str(path)}
        elif tables and (beside_pictures or is_csv) and not _names_its_files(path):
            # If there are more pictures than tables, `load_dataset` would take the pictures for the rows.
            base = str(path.resolve())
            files = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base, allowed_extensions=[suffix])
            arguments = file_arguments({str(key): list(value) for key, value in files.items()})
    elif path.is_absolute() or path.suffix in BUILDERS or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"`dataset_name={name!r}` is neither a file nor a folder.")

    base_split = re.split(r"\[", split, maxsplit=1)[0]
    if streaming and base_split != split:
        raise ValueError(f"The slice {split!r} cannot be streamed; stream {base_split!r}, or set `streaming: false`.")
    try:
        dataset = load_dataset(**arguments, streaming=streaming)
    except StopIteration as error:  # `datasets` raises it for a file without rows
        raise ValueError(
            f"`dataset_name={name!r}` has a file without rows in it. Name a file, or a folder with only rows and "
            "pictures."
        ) from error
    if streaming and base_split in dataset and dataset[base_split].features is None:
        # A stream of CSV learns its columns from its first rows. `datasets` has no public method for this.
        dataset[base_split] = dataset[base_split]._resolve_features()
    if base_split not in dataset:
        raise ValueError(
            f"{name!r} has no split {base_split!r}; it has {list(dataset)}. Set `dataset_train_split` and "
            "`dataset_test_split`."
        )
    rows = dataset[split] if base_split == split else load_dataset(**arguments, split=split)
    return (rows.rename_columns(_picture_names(rows.column_names)) if is_picture_table else rows), folders


def file_arguments(files: dict[str, list[str]]) -> dict[str, Any]:
    """
    Arguments of [`~datasets.load_dataset`] for files with rows.

    Args:
        files (`dict[str, list[str]]`): paths by split, all with the same ending.

    Returns:
        `dict`. Raises `ValueError` for a file ending that is not in `BUILDERS`.
    """
    paths = [path for of_split in files.values() for path in of_split]
    suffix = Path(paths[0]).suffix
    builder = _builder(suffix)
    options = csv_options(paths, "\t" if suffix == ".tsv" else ",") if builder == "csv" else {}
    return {"path": builder, "data_files": files, **options}


def undecoded(dataset: Dataset | IterableDataset) -> tuple[Dataset | IterableDataset, list[str]]:
    """
    The data set with its pictures, videos and sounds as undecoded files, and the names of all columns that hold such
    media at any depth.

    `datasets` would pass any file to any of Pillow's decoders before its header can be checked. It would also fetch
    every address.
    """
    columns = {name: _as_files(feature) for name, feature in dataset.features.items()}
    changed = {name: feature for name, feature in columns.items() if feature != dataset.features[name]}
    for name, feature in changed.items():
        dataset = dataset.cast_column(name, feature)
    return dataset, [name for name, feature in columns.items() if _holds_media(feature)]


def _is_media(feature: Any) -> bool:
    return hasattr(feature, "decode") and not isinstance(feature, Json)


def _holds_media(feature: Any) -> bool:
    parts = feature.values() if isinstance(feature, Mapping) else [getattr(feature, "feature", None)]
    return _is_media(feature) or any(_holds_media(part) for part in parts if part is not None)


def _as_files(feature: Any) -> Any:
    if isinstance(feature, Mapping):
        return {name: _as_files(part) for name, part in feature.items()}
    if getattr(feature, "feature", None) is not None:  # a list, of any of `datasets`' three kinds
        return replace(feature, feature=_as_files(feature.feature))
    return replace(feature, decode=False) if _is_media(feature) else feature


def _picture_names(columns: Collection[str]) -> dict[str, str]:
    """New names for columns with paths of pictures, as in `imagefolder`: `file_name` becomes `image`."""
    found = {column: re.fullmatch(r"(?:(.+)_)?file_name(s?)", column) for column in columns}
    return {column: match[1] or f"image{match[2]}" for column, match in found.items() if match}


def _names_its_files(folder: Path) -> bool:
    """Whether the folder is a clone of a hub data set with a card that maps files to splits."""
    card = folder / "README.md"
    return card.is_file() and re.search(r"^configs:", card.read_text(encoding="utf-8"), re.MULTILINE) is not None


def _builder(suffix: str) -> str:
    if suffix not in BUILDERS:
        raise ValueError(f"A data set's file must end with one of {list(BUILDERS)}, got {suffix!r}.")
    return BUILDERS[suffix]


def _tables(folder: Path) -> tuple[list[Path], bool]:
    """The files with rows in a folder, and whether there are pictures, too."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    pictures = Image.registered_extensions()
    return [file for file in files if file.suffix in BUILDERS], any(file.suffix.lower() in pictures for file in files)


def _check_twins(name: str, tables: Collection[Path]) -> None:
    """Raise a `ValueError` for files such as `train.csv` and `train.jsonl`: `datasets` would read only one of them."""
    first: dict[Path, Path] = {}
    for table in sorted(tables):
        twin = first.setdefault(table.with_suffix(""), table)
        if twin != table:
            raise ValueError(
                f"`dataset_name={name!r}` has both {twin.name!r} and {table.name!r} in it, and only one of them would "
                f"be read: remove one, or name the file, as in `dataset_name={str(table)!r}`."
            )
