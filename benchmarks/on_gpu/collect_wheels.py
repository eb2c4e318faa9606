"""
Collect the wheels that `make gpu` installs on a machine without a network: this package and the lines of `wheels.txt`.

    python benchmarks/on_gpu/collect_wheels.py

The folder `gpu-wheels` is made anew. Copy the checkout with it to the other machine.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "gpu-wheels"
LIMIT_MB = 60


def collect(folder: Path, python_version: str) -> list[Path]:
    """
    Build this package's wheel, and download the other wheels.

    Args:
        folder (`Path`): made anew.
        python_version (`str`): version of the Python on the other machine, such as `"3.12"`.

    Returns:
        `list[Path]`: the wheels.

    Raises:
        subprocess.CalledProcessError: if pip fails, for example because an index has no such wheel.
    """
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    chosen = ["--only-binary=:all:", "--python-version", python_version, "--implementation", "cp"]
    chosen += ["--requirement", str(Path(__file__).with_name("wheels.txt"))]
    chosen += ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(folder), *chosen], check=True)
    return sorted(folder.glob("*.whl"))


def main(argv: list[str] | None = None) -> int:
    """Collect, and print the wheels with their sizes. Returns 1 if they are too large together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python_version", default="3.12", help="version of the other machine's Python (3.12)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the wheels (gpu-wheels)")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    sizes = {wheel.name: wheel.stat().st_size / 1e6 for wheel in collect(options.folder, options.python_version)}
    for name, size in sizes.items():
        print(f"{size:6.1f} MB  {name}")
    total = sum(sizes.values())
    print(f"{total:6.1f} MB  together, in {options.folder}")
    if total > LIMIT_MB:
        print(f"The limit is {LIMIT_MB} MB: a machine that is lent may take no more.", file=sys.stderr)
    return int(total > LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())
