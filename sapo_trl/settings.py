"""
One home for each setting of a data class, such as [`SAPOConfig`].

The field's type has the choices (`Literal`) or the range ([`Bounds`]), which [`check_settings`] checks. The docstring
of the class has the text, and [`help_from_docstring`] makes the help of the command line from it.
"""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .names import nearest_name


T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Bounds:
    """
    Range of a number, as metadata of its type: `Annotated[float, Bounds(gt=0, le=1)]`.

    Args:
        ge (`float`, *optional*): smallest number.
        gt (`float`, *optional*): largest number below the range.
        le (`float`, *optional*): largest number.
        lt (`float`, *optional*): smallest number above the range.
        note (`str`, *optional*, defaults to `""`): sentence to end an error with.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    note: str = ""

    def __contains__(self, number: float) -> bool:
        return (  # no comparison with nan holds
            (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
            and (self.lt is None or number < self.lt)
        )

    def __str__(self) -> str:
        """The words for an error, after "must"."""
        if (self.gt, self.lt) == (-math.inf, math.inf):
            return "be finite"
        if self.le is None and self.lt is None:
            if self.gt is None:
                return f"be at least {self.ge}"
            return "be positive" if self.gt == 0 else f"be greater than {self.gt}"
        low = f"[{self.ge}" if self.ge is not None else f"({-math.inf if self.gt is None else self.gt}"
        high = f"{self.le}]" if self.le is not None else f"{self.lt})"
        return f"lie in {low}, {high}"


PositiveInt = Annotated[int, Bounds(ge=1)]
NonNegativeInt = Annotated[int, Bounds(ge=0)]
PositiveFloat = Annotated[float, Bounds(gt=0)]
NonNegativeFloat = Annotated[float, Bounds(ge=0)]
FiniteFloat = Annotated[float, Bounds(gt=-math.inf, lt=math.inf)]
UnitInterval = Annotated[float, Bounds(ge=0, le=1)]
Probability = Annotated[float, Bounds(gt=0, le=1, note="It is a probability.")]
Share = Annotated[float, Bounds(gt=0, le=1, note="It is a share: 0.2 is a fifth.")]


def check_settings(settings: Any) -> None:
    """
    Check each setting against its own type: a `Literal` lists the choices, [`Bounds`] give the range of a number.

    Args:
        settings: instance of a data class.

    Raises:
        ValueError: for a value that its type does not allow; the message names the setting, its value and the
            allowed values.
    """
    for name, hint in _checked_hints(type(settings)).items():
        check_setting(name, getattr(settings, name), hint)


def check_setting(name: str, value: Any, hint: Any) -> None:
    """
    Check one setting, as [`check_settings`] does.

    Args:
        name (`str`): its name, for the error.
        value: its value.
        hint: its type: a `Literal`, or a number annotated with [`Bounds`]; or either of them or `None`.

    Raises:
        ValueError: if the type does not allow the value.
    """
    alternatives = _alternatives(hint)
    if value is None and type(None) in alternatives:
        return
    or_none = " (or `None`)" if type(None) in alternatives else ""
    choices = _choices(alternatives)
    if choices:
        if value not in choices:
            nearest = nearest_name(value, choices) if isinstance(value, str) else ""
            raise ValueError(f"`{name}` must be one of {choices}{or_none}, got {value!r}.{nearest}")
        return
    kind, bounds = _bounded(alternatives)
    note = f" {bounds.note}" if bounds.note else ""
    if not isinstance(value, Real) or isinstance(value, bool):
        number = "a whole number" if kind is int else "a number"
        raise ValueError(f"`{name}` must be {number}{or_none}, got {value!r}.{note}")
    if value not in bounds:
        raise ValueError(f"`{name}` must {bounds}{or_none}, got {value}.{note}")
    if kind is int and not isinstance(value, Integral):
        raise ValueError(f"`{name}` must be a whole number{or_none}, got {value}.{note}")


@lru_cache
def _checked_hints(cls: type) -> dict[str, Any]:
    """Type of each setting that has choices or a range, by name."""
    hints = get_type_hints(cls, include_extras=True)
    checked = {}
    for setting in fields(cls):
        alternatives = _alternatives(hints[setting.name])
        if _choices(alternatives) or _bounded(alternatives):
            checked[setting.name] = hints[setting.name]
    return checked


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _choices(alternatives: Iterable[Any]) -> tuple[Any, ...]:
    """The allowed values, if there is a list of them: `str | Literal[False]` allows any text."""
    parts = [part for part in alternatives if part is not type(None)]
    if any(get_origin(part) is not Literal for part in parts):
        return ()
    return tuple(choice for part in parts for choice in get_args(part))


def _bounded(alternatives: Iterable[Any]) -> tuple[type, Bounds] | None:
    """The type and the range of a number."""
    for part in alternatives:
        for annotation in getattr(part, "__metadata__", ()):
            if isinstance(annotation, Bounds):
                return part.__origin__, annotation
    return None


# ------------------------------------------------------------------------------------------------- texts of docstrings


_PARAMETER = re.compile(r"(?P<indent> *)(?P<name>\w+) \(\[?`.*\):(?: (?P<text>.*))?$")


def parameter_texts(docstring: str) -> dict[str, str]:
    """
    Texts on the parameters, as Hugging Face's docstrings have them: `` name (`type`, *optional*): text ``.

    Args:
        docstring (`str`): docstring, or a part of it.

    Returns:
        `dict[str, str]`: text by the parameter's name, in the order of the docstring.
    """
    lines: dict[str, list[str]] = {}
    name, indent = None, 0
    for line in inspect.cleandoc(docstring).splitlines():
        begun = _PARAMETER.match(line)
        if begun and (name is None or len(begun["indent"]) <= indent):
            name, indent = begun["name"], len(begun["indent"])
            lines[name] = [begun["text"] or ""]
        elif line.strip() and len(line) - len(line.lstrip()) <= indent:
            name = None
        elif name is not None:
            lines[name].append(line)
    return {name: " ".join(" ".join(text).split()) for name, text in lines.items()}


def first_sentence(text: str) -> str:
    """The first sentence, without its full stop."""
    return re.split(r"(?<=[\w`'\")\]])\.\s", text.strip())[0].rstrip(".")


def help_from_docstring(cls: T) -> T:
    """
    Give each setting of a data class its help: the first sentence of the docstring's text on it.

    Args:
        cls (`type`): data class. Only the fields that it declares itself get a text: a parent's belong to the parent.

    Returns:
        `type`: the class.
    """
    texts = parameter_texts(cls.__doc__ or "")  # no docstrings under `python -OO`
    declared = inspect.get_annotations(cls)
    for setting in fields(cls):
        if setting.name in declared and setting.name in texts:
            # A string is `"entropy"` in the documentation and 'entropy' on a terminal. argparse formats with `%`.
            text = re.sub(r'`"([^"`]*)"`', r"'\1'", first_sentence(texts[setting.name])).replace("%", "%%")
            setting.metadata = types.MappingProxyType({**setting.metadata, "help": text})
    return cls
