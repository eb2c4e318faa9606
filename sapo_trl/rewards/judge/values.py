"""The kinds of answers. An answer is read as one of them before it is compared."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from .evaluation import Number
from .nodes import Node
from .units import Unit


@dataclass(frozen=True)
class Scalar:
    """A number or an expression, with its unit."""

    node: Node
    unit: Unit | None = None
    percent: bool = False
    places: int | None = None
    """Decimal places, of a number that is written as a finite decimal."""
    letters: str | None = None
    """Of letters side by side: `ab` may be a product or a name."""


@dataclass(frozen=True)
class Phrase:
    """Words and names, with the numbers among them: `ASA`, `\\angle ABC`, `5 km north`."""

    tokens: tuple[str | Fraction, ...]


@dataclass(frozen=True)
class Items:
    """Several answers: `1, 2`, `\\{1, 2\\}`, `(1, 2)`."""

    items: tuple[Value, ...]
    brackets: str
    """`""` for a list, `"{}"` for a set, else the brackets: then order matters."""

    @property
    def ordered(self) -> bool:
        return self.brackets not in ("", "{}")


@dataclass(frozen=True)
class Named:
    """A value with its names: `x = 5`, `f(2) = 5`, `\\text{Area} = 5`."""

    names: tuple[str, ...]
    value: Value
    equation: tuple[Node, Node] | None = None
    """Both sides, where these are expressions."""


@dataclass(frozen=True)
class Rounded:
    """A number and the same one, rounded: `2\\sqrt{3} \\approx 3.46`."""

    exact: Value
    rounded: Value


@dataclass(frozen=True)
class Equation:
    """Two expressions that are equal."""

    left: Node
    right: Node


@dataclass(frozen=True)
class Inequality:
    """Two expressions, the first one less than the second, or not equal to it."""

    left: Node
    right: Node
    sign: str
    """`<`, `<=` or `!=`."""


@dataclass(frozen=True)
class RealSet:
    """A union of intervals, of the real numbers that a variable may take."""

    intervals: tuple[tuple[Bound, Bound], ...]
    """Each a lower and an upper bound, in order, without an overlap."""
    variable: str | None = None


@dataclass(frozen=True)
class Bound:
    """One end of an interval."""

    value: Number | None
    """`None` if there is no end."""
    closed: bool


@dataclass(frozen=True)
class Matrix:
    """A matrix."""

    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class Ratio:
    """`2:3:4`."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Literal:
    """A date, a time of the day, a number in another base than ten: equal only to the same."""

    kind: str
    parts: tuple


@dataclass(frozen=True)
class Impossible:
    """A statement that is no answer: `1 = 2`, `x = x`."""


Value = (
    Scalar | Phrase | Items | Named | Rounded | Equation | Inequality | RealSet | Matrix | Ratio | Literal | Impossible
)
