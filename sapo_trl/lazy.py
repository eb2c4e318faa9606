"""Packages whose names are imported when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, module_of: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    Make the `__getattr__` and `__dir__` of a package (PEP 562) whose modules are expensive to import.

    Args:
        package (`str`): the package's `__name__`.
        module_of (`Mapping[str, str]`):
            The module of each public name, relative to the package; a dot in front leads to the folder above. No name
            may also be a module's: Python puts an imported module into its package, where it would hide the name.

    Returns:
        `tuple`: the two functions, to be assigned to `__getattr__` and `__dir__` in the package.
    """

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{module_of[name]}", package), name)

    return get, lambda: sorted(module_of)
