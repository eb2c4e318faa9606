"""`sapo-trl configs`: lists the run files that come with the package, prints one, or copies some to a folder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..run_files import find_run_file, run_file_names, run_files_folder
from ..short_errors import ShortErrors


def main(argv: Sequence[str]) -> int:
    """Print the names of all run files, or one file; with `--copy_to`, copy. Returns 2 for an unknown name."""
    parser = ShortErrors(
        prog="sapo-trl configs",
        description="List the run files that come with the package, print one, or copy them to a folder of yours. "
        "Every --config takes these names.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="*", help="a run file, such as embedded or accelerate/zero3_8gpu")
    parser.add_argument("--copy_to", type=Path, metavar="FOLDER", help="copy the named files, or all, to this folder")
    arguments = parser.parse_args(list(argv))
    names = arguments.name or (run_file_names() if arguments.copy_to else [])
    try:
        paths = [find_run_file(name) for name in names]
        if arguments.copy_to:
            _copy(paths, arguments.copy_to)
        elif paths:
            print("\n".join(path.read_text(encoding="utf-8").rstrip() for path in paths))
        else:
            print("\n".join(run_file_names()))
    except OSError as error:
        print(f"sapo-trl configs: error: {error}", file=sys.stderr)
        return 2
    return 0


def _copy(paths: Sequence[Path], folder: Path) -> None:
    targets = [folder / path.relative_to(run_files_folder()) for path in paths]
    for target in targets:
        if target.exists():
            raise FileExistsError(f"{str(target)!r} exists already; nothing was copied.")
    for path, target in zip(paths, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        print(target)
