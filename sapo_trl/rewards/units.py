"""Reads the unit after a number. The list of units is closed, so no other word can count as a unit."""

import re

from .judge.tokens import tokenized
from .judge.units import UNIT_NAMES, Unit
from .judge.units import read_unit as read_judged


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Alone, one letter is a unit only where it is a usual one.
_LETTERS = _words("m g s h L N J W V A C F K T Ω")
# Names without a size that can be compared.
_OTHERS = _words("US ' '' \" ′ ′′ $ ¢ kmh Nm lbf sr bps fl pair pairs zero zeros")
# In front of a unit, and behind it.
_IN_FRONT = _words(
    "square sq cubic cu red blue green yellow white black different distinct possible whole real positive"
)
_POWERS = _words("squared cubed")
_BEHIND = _words("old long wide high tall deep thick away apart each total altogether")

_CHINESE = re.compile(
    r"(?:平方|立方)?(?:毫米|厘米|分米|千米|公里|米|毫升|升|毫克|千克|公斤|克|吨|斤|秒|秒钟|分钟|分|小时|小時|天|周|年|岁|歳|元|角|円|圆|圓|块|塊|度"
    r"|个|個|人|名|只|隻|条|條|本|张|張|支|枚|页|頁|件|颗|顆|辆|輛|棵|次|种|種|对|對|组|組|根|把|台|位|匹|冊)"
    r"|美元|ドル|欧元|日元|英镑|平方|立方|公顷|時間|摄氏度"
    r"|원|개|명|시간|초|분|일|미터|센티미터|킬로미터|그램|킬로그램"
)

_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_POWER = re.compile(r"\s*\^\s*(?:\{\s*([+-]?[1-4])\s*\}|([+-]?[1-4])(?!\.?[0-9]))")
_SPLIT_SYMBOL = re.compile(r"([μkMGmn])\s+(?=Ω)|(μ)\s+(?=[a-zA-Z])")
_PER = re.compile(r"\s*(?:/|\bper\b|每)\s*")
_FACTOR = re.compile(r"[\s*]+|(?<=[A-Za-z])-(?=[A-Za-z])|(?=°)|(?<=°)")
_WITH_POWER = re.compile(r"(.*?[^\d^+-])(?:\^?([+-]?[1-4]))?", re.DOTALL)


def read_unit(text: str) -> str | None:
    r"""
    A unit in one notation, or `None` if the text is not a known unit.

    Args:
        text (`str`):
            The text after a number, including the spaces. A single letter directly after its number is not a unit,
            because `5m` may be five times `m`.

    Returns:
        `str` or `None`: The empty string for an empty text.

    Example:

    ```python
    >>> from sapo_trl.rewards.units import read_unit

    >>> [read_unit(text) for text in (" metres per second", r"\,\mathrm{m}", "", " million", "m", " xy")]
    ['metre/second', None, '', None, None, None]
    >>> read_unit(" kg m^{-3}"), read_unit("cm2"), read_unit(" square units")
    ('kg m^-3', 'cm^2', 'square unit')
    ```
    """
    touches = text[:1].isascii() and text[:1].isalpha()
    text = _SPLIT_SYMBOL.sub(r"\1\2", _POWER.sub(r"^\1\2 ", _FRACTION.sub(r"\1/(\2) ", text)))
    text = _without_brackets(text)
    if text is None:
        return None
    text = text.strip().removesuffix(".").rstrip("\\").rstrip()
    if not text:
        return ""
    parts = []
    for i, part in enumerate(_PER.split(text)):
        names = [_name(factor) for factor in _FACTOR.split(part) if factor]
        if None in names or (not names and i > 0) or not _in_order(names, is_last=True):
            return None
        parts.append(" ".join(names))
    unit = "/".join(parts)
    return None if touches and unit.partition("^")[0] in _LETTERS else unit


def scale_between(unit: str, other: str) -> float | None:
    """
    The size of a unit in another unit: 100 for `m` and `cm`. 1 if a unit is missing or has no known size. `None` if
    the two units measure different things.
    """
    if {unit, other} == {"° C", "° F"}:
        return None
    one, two = (_judged(name) for name in (unit, other))
    if one is None or two is None or not one.powers or not two.powers:
        return 1.0
    return float(one.factor / two.factor) if one.powers == two.powers else None


def _judged(unit: str) -> Unit | None:
    return read_judged(tokenized(rf"\text{{{unit}}}")) if unit else None


def _without_brackets(text: str) -> str | None:
    """The text with its brackets resolved, because they only group here; `None` if they are not balanced."""
    for pair in ("{}", "()", "[]"):
        depth = 0
        for character in text:
            depth += (character == pair[0]) - (character == pair[1])
            if depth < 0:
                return None
        if depth:
            return None
        text = text.replace(pair[0], " ").replace(pair[1], " ")
    return text


def _name(factor: str) -> str | None:
    match = _WITH_POWER.fullmatch(factor)
    if not match:
        return None
    name, power = match[1].removesuffix("."), f"^{match[2]}" if match[2] else ""
    if power and not name[-1:].isalpha():
        return None
    if name in _LETTERS | _OTHERS or name == "°" or _CHINESE.fullmatch(name):
        return name + power
    word = name.lower()
    if word in _IN_FRONT | _POWERS | _BEHIND:
        return word + power
    is_symbol = name in UNIT_NAMES and not (len(name) == 1 and name.isascii())
    if not is_symbol and (len(word) < 3 or word not in UNIT_NAMES):
        return None
    if word in ("degree", "degrees"):
        return "°" + power
    spelled = name if is_symbol else word
    nouns = (noun for noun in _singulars(spelled) if noun in UNIT_NAMES and noun != "square")
    return (next(nouns, spelled) if spelled.islower() and len(spelled) > 2 else spelled) + power


def _singulars(word: str) -> tuple[str, ...]:
    return word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)


def _in_order(names: list[str], is_last: bool) -> bool:
    """Whether words that need a unit have one: `12 square` and `12 cubed` are not quantities."""
    units = [i for i, name in enumerate(names) if name not in _IN_FRONT | _POWERS | _BEHIND]
    if not names:
        return True
    if not units:
        return all(name in _BEHIND for name in names)
    for i, name in enumerate(names):
        if name in _IN_FRONT and i > units[-1]:
            return False
        if name in _POWERS and i < units[0]:
            return False
        if name in _BEHIND and i < units[-1]:
            return False
    return True
