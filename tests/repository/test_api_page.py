"""The page of the API: each entry is a module or a name of one, and the public names have an entry."""

import importlib
import re
from pathlib import Path

import pytest

import sapo_trl


PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^::: ([\w.]+)$", PAGE, re.MULTILINE)


def found(entry: str) -> object:
    """The module or the object at an import path."""
    try:
        return importlib.import_module(entry)
    except ModuleNotFoundError as error:
        if error.name is None or not entry.startswith(error.name):
            raise  # a library that the module needs
    module, _, name = entry.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_leads_to_something_that_is_described(entry):
    assert found(entry).__doc__


def test_public_names_have_an_entry():
    described = [found(entry) for entry in ENTRIES]
    assert len(described) > 20
    for name in sapo_trl.__all__:
        if name != "PRESETS":  # the page of algorithms shows them
            assert getattr(sapo_trl, name) in described, name
