"""
Every setting for people to read: the tables of `docs/configuration.md`, and the help of `sapo-trl train`.

`python -m docs.generate.config_table`, called in a clone of the repository, writes both.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trl import GRPOConfig, ModelConfig

from sapo_trl.cli.run_arguments import short_help
from sapo_trl.cli.train import TrainArguments
from sapo_trl.cli.train_command import HELP
from sapo_trl.config import SAPOConfig
from sapo_trl.settings import parameter_texts


TABLES_START, TABLES_END = "<!-- settings: start -->", "<!-- settings: end -->"
DOCUMENT = Path("docs/configuration.md")

_GROUP = re.compile(r"^ +> Parameters that control (.*)\n", re.MULTILINE)


def own_fields(config: type) -> dict[str, Field]:
    """The settings that [`SAPOConfig`] adds to [`~trl.GRPOConfig`] or gives another default, by name."""
    inherited = {setting.name: setting for setting in fields(GRPOConfig)}
    return {
        setting.name: setting
        for setting in fields(config)
        if setting.name not in inherited or _default(setting) != _default(inherited[setting.name])
    }


def described(docstring: str) -> dict[str, dict[str, str]]:
    """
    The text of a docstring on each parameter.

    Args:
        docstring (`str`): with `> Parameters that control …` above each group of parameters.

    Returns:
        `dict[str, dict[str, str]]`: by group and name, in the order of the docstring.
    """
    _, *parts = _GROUP.split(docstring)
    return {group: parameter_texts(body) for group, body in zip(parts[::2], parts[1::2], strict=True)}


def markdown_tables() -> str:
    """One table for each group of settings."""
    own = own_fields(SAPOConfig)
    hints = get_type_hints(SAPOConfig)
    lines = []
    for group, texts in described(SAPOConfig.__doc__).items():
        lines += [f"### {group[0].upper()}{group[1:]}", "", *_HEADER]
        for name, text in texts.items():
            setting = own.pop(name, None) or next(f for f in fields(SAPOConfig) if f.name == name)
            lines.append(_row(name, hints[name], _default(setting), text))
        lines.append("")
    inherited = {setting.name: setting for setting in fields(GRPOConfig)}
    lines += ["### TRL's, with another default", "", *_HEADER]
    for name, setting in own.items():
        text = f"{setting.metadata['help']} TRL's default: {_code(_default(inherited[name]))}."
        lines.append(_row(name, hints[name], _default(setting), text))
    lines += ["", "## Settings of `sapo-trl train`", "", *_HEADER]
    hints = get_type_hints(TrainArguments)
    texts = parameter_texts(TrainArguments.__doc__)
    for setting in fields(TrainArguments):
        lines.append(_row(setting.name, hints[setting.name], _default(setting), texts[setting.name]))
    return "\n".join(lines)


_HEADER = ["| Setting | Type | Default | |", "| --- | --- | --- | --- |"]


def _row(name: str, hint: Any, default: Any, text: str) -> str:
    # A reference of the docstrings' kind, such as [`~trl.GRPOTrainer`], is code here.
    text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"`\1`", text).replace("|", r"\|")
    return f"| `{name}` | {_type(hint)} | {_code(default)} | {text} |"


def _default(setting: Field) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def _code(value: Any) -> str:
    """A value in YAML's form, in backticks."""
    if isinstance(value, str):  # not escaped, because `\\s` would be another value
        return f'`"{value}"`'
    return f"`{json.dumps(getattr(value, 'value', value))}`"


def _type(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type(part) for part in get_args(hint) if part is not type(None)) + (
            ", `null`" if type(None) in get_args(hint) else ""
        )
    if get_origin(hint) is Literal:  # the text lists the choices
        return f"`{type(get_args(hint)[0]).__name__}`"
    if get_origin(hint) is not None:
        return f"`{hint}`"
    return f"`{hint.__name__}`" if inspect.isclass(hint) else f"`{hint}`"


def main() -> None:
    """Write the tables and the help."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(TABLES_START)
    _, _, after = rest.partition(TABLES_END)
    text = f"{before}{TABLES_START}\n\n{markdown_tables()}\n\n{TABLES_END}{after}"
    DOCUMENT.write_text(text, encoding="utf-8")
    HELP.write_text(short_help(TrainArguments, SAPOConfig, ModelConfig) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
