"""The run files that come with the package: `trainer_configs/` of a checkout, package data of an installed wheel."""

from pathlib import Path

from .names import nearest_name


_PACKAGE = Path(__file__).parent


def run_files_folder() -> Path:
    """
    The folder of the run files.

    `setup.py` puts `trainer_configs/` into the wheel as `sapo_trl/trainer_configs`. A checkout, editable installs
    included, has the folder beside the package.
    """
    installed = _PACKAGE / "trainer_configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "trainer_configs"


def run_file_names() -> list[str]:
    """The names of all run files, such as `"embedded"` or `"accelerate/zero3_8gpu"`, without `.yaml`."""
    folder = run_files_folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def find_run_file(name: str | Path) -> Path:
    """
    The path of a run file.

    Args:
        name (`str` or `Path`):
            Path of a file, or the name of a run file that comes with the package, see [`run_file_names`]. A file
            comes before a name.

    Returns:
        `Path`

    Raises:
        FileNotFoundError: if there is neither such a file nor such a name.
    """
    path = Path(name)
    if path.is_file():
        return path
    # Commands that name a file of the checkout also work beside an installed wheel.
    text = str(name).removeprefix("trainer_configs/").removesuffix(".yaml")
    if text in (names := run_file_names()):
        return run_files_folder() / f"{text}.yaml"
    raise FileNotFoundError(
        f"no file and no run file of the package has the name {str(name)!r}.{nearest_name(text, names)} "
        "`sapo-trl configs` lists the names."
    )
