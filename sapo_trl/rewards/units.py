"""The units that may stand behind a number: a closed list, so that no other word and no unknown passes for one."""

import re

from .judge.tokens import tokenized
from .judge.units import Unit
from .judge.units import read_unit as read_judged


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Symbols of SI units, each with the prefixes that answers use. Rarer ones would let products of unknowns pass: `ab`.
_PREFIXES = {
    "m": "n μ m c d k",
    "g": "n μ m k",
    "s": "n μ m",
    "L": "μ m c d k",
    "l": "μ m c d k",
    "N": "m k M",
    "J": "m k M G",
    "W": "m k M G",
    "Wh": "k M G",
    "V": "μ m k M",
    "A": "μ m k",
    "C": "n μ m",
    "F": "n μ p m",
    "T": "m μ",
    "K": "m",
    "Ω": "m k M",
    "Pa": "h k M G",
    "Hz": "k M G",
    "eV": "k M G",
    "mol": "m μ k",
    "cal": "k",
    "bar": "m",
    "B": "k K M G T d",
}
# Alone, one letter is a unit only where it is a usual one.
_LETTERS = _words("m g s h L N J W V A C F K T Ω")
_SYMBOLS = (
    _LETTERS
    | {prefix + base for base, prefixes in _PREFIXES.items() for prefix in prefixes.split()}
    | {base for base in _PREFIXES if len(base) > 1}
    | _words("rad sr atm bps Å rpm mph kph kmh kmph psi Nm lbf hp nmi cc ha mmHg")
    | _words("in ft yd mi oz lb lbs gal tsp tbsp sec min hr hrs mins secs yr yrs kgs kms cms fl deg rev")
    | _words("USD EUR GBP CNY RMB JPY INR KRW CHF AUD CAD Rs rs kr US $ € £ ¥ ₹ ₩ ₽ ₺ ₪ ₫ ₱ ₦ ₴ ¢")
    | _words("' '' \" ′ ′′")
)

_SPELLED = re.compile(
    r"(?:milli|centi|deci|deca|deka|hecto|kilo|mega|giga|micro|nano)?"
    r"(?:meter|metre|gram|gramme|liter|litre|second|watt|volt|amp|ampere|joule|newton|pascal|byte|bit|calorie|ohm"
    r"|coulomb|farad|tesla|electronvolt|mole)s?"
)
_NOUNS = _words(
    # imperial, time, angle, temperature, currency
    "inch foot yard mile ounce pound ton tonne gallon quart pint cup acre hectare knot teaspoon tablespoon horsepower "
    "minute hour day week month year decade century degree radian revolution rotation celsius fahrenheit kelvin hertz "
    "dollar cent euro rupee yuan yen won penny nickel dime "
    # counted
    "unit person student child boy girl kid adult man woman teacher worker player member passenger friend customer "
    "visitor voter employee family class animal dog cat fish bird cow pig sheep horse chicken duck rabbit apple "
    "orange banana pear peach egg nut berry grape cookie candy cake pie pizza slice sandwich meal serving ball marble "
    "toy sticker stamp block cube tile brick book page pencil pen notebook coin card ticket box bag basket bottle "
    "glass jar cup chair table desk bed room house building car truck bus bike train tree flower plant seed leaf "
    "shirt shoe hat dress pair set group team row column item piece object part cell bar dot share vote word letter "
    "point line segment side edge face vertex angle triangle square circle rectangle polygon diagonal digit term "
    "factor divisor solution root integer number way arrangement permutation combination outcome subset "
    "element path game round step move turn trip lap time goal run mark question problem atom molecule electron "
    "proton neutron photon ion particle zero story floor dish city mango"
)
_IRREGULAR = _words("feet people children men women fish sheep mice geese leaves vertices inches centuries pennies")
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
    A unit in one way of writing, or `None` if the text is no unit that is known.

    Args:
        text (`str`):
            All that follows a number, including the spaces: a single letter that touches its number is no unit, since
            `5m` may be five times `m`.

    Returns:
        `str` or `None`: The empty string for no unit at all.

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
    How many of another unit a unit is: 100 for `m` and `cm`. 1 if one of them is missing or of unknown size, `None`
    if they measure different things.
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
    """Brackets only group here; `None` if they do not pair."""
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
    if name in _SYMBOLS or name == "°" or _CHINESE.fullmatch(name):
        return name + power
    word = name.lower()
    if word in _IN_FRONT | _POWERS | _BEHIND | _IRREGULAR:
        return word + power
    singular = next((noun for noun in (word, *_singulars(word)) if noun in _NOUNS), None)
    if singular is not None:
        noun = {"degree": "°", "square": "squares"}.get(singular, singular)
        return noun + power
    return word.removesuffix("s") + power if _SPELLED.fullmatch(word) else None


def _singulars(word: str) -> tuple[str, ...]:
    return word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)


def _in_order(names: list[str], is_last: bool) -> bool:
    """Whether words that need a unit have one: `12 square` and `12 cubed` are no quantities."""
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
