"""Units of measurement, currencies, and things that are counted."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from .tokens import Token


@dataclass(frozen=True)
class Unit:
    """A product of powers of base units, and how many of these it is."""

    powers: tuple[tuple[str, int], ...] = ()
    factor: Fraction = Fraction(1)

    def __mul__(self, other: Unit) -> Unit:
        powers = dict(self.powers)
        for name, power in other.powers:
            powers[name] = powers.get(name, 0) + power
        return Unit(tuple(sorted((n, p) for n, p in powers.items() if p)), self.factor * other.factor)

    def __pow__(self, exponent: int) -> Unit:
        return Unit(tuple((n, p * exponent) for n, p in self.powers), self.factor**exponent)


_BASES = {
    # Base unit: other units in it. A name without a value is another name of the base.
    "metre": {
        "": "m meter meters metre metres 米",
        "1000": "kms 千米 公里",
        "1/10": "分米",
        "1/100": "cms 厘米",
        "1/1000": "毫米",
        "0.0254": "in inch inches 英寸",
        "0.3048": "ft foot feet 英尺",
        "0.9144": "yd yard yards",
        "1609.344": "mi mile miles 英里",
    },
    "second": {
        "": "s sec secs second seconds 秒",
        "60": "min mins minute minutes 分钟",
        "3600": "h hr hrs hour hours 小时",
        "86400": "d day days 天",
        "604800": "week weeks wk 周 星期",
    },
    "year": {
        "": "yr yrs year years 年 岁",
        "1/12": "month months 个月",
        "10": "decade decades",
        "100": "century centuries",
    },
    "gram": {
        "": "g gram grams gramme grammes 克",
        "1000": "kgs kilo kilos 千克 公斤",
        "1/1000": "毫克",
        "1000000": "t ton tons tonne tonnes 吨",
        "28.349523125": "oz ounce ounces",
    },
    "litre": {
        "": "l L liter liters litre litres 升",
        "1/1000": "毫升",
    },
    "gallon": {"": "gal gallon gallons", "1/4": "quart quarts qt", "1/8": "pint pints pt", "1/16": "cup cups"},
    "degree": {"": "deg degree degrees ° 度"},
    "radian": {"": "rad rads radian radians 弧度"},
    "celsius": {"": "celsius ℃ 摄氏度"},
    "fahrenheit": {"": "fahrenheit ℉"},
    "kelvin": {"": "K kelvin kelvins"},
    "newton": {"": "N newton newtons"},
    "joule": {"": "J joule joules"},
    "watt": {"": "W watt watts"},
    "watt-hour": {"": "Wh"},
    "volt": {"": "V volt volts"},
    "ampere": {"": "A amp amps ampere amperes"},
    "ohm": {"": "ohm ohms Ω"},
    "pascal": {"": "Pa pascal pascals"},
    "hertz": {"": "Hz hertz"},
    "mole": {"": "mol mole moles"},
    "coulomb": {"": "C coulomb coulombs"},
    "farad": {"": "farad farads"},
    "tesla": {"": "T tesla teslas"},
    "electronvolt": {"": "eV electronvolt electronvolts"},
    "atmosphere": {"": "atm atmosphere atmospheres"},
    "bar": {"": "bar bars"},
    "mmHg": {"": "mmHg"},
    "psi": {"": "psi"},
    "horsepower": {"": "hp horsepower"},
    "rpm": {"": "rpm"},
    "ångström": {"": "Å"},
    "nautical mile": {"": "nmi"},
    "calorie": {"": "cal calorie calories"},
    "spoon": {"": "tbsp tablespoon tablespoons", "1/3": "tsp teaspoon teaspoons"},
    "decibel": {"": "dB decibel decibels"},
    "knot": {"": "knot knots"},
    "light-year": {"": "ly light-year light-years"},
    "astronomical unit": {"": "AU"},
    "parsec": {"": "pc parsec parsecs"},
    "acre": {"": "acre acres"},
    "hectare": {"": "ha hectare hectares 公顷"},
    "byte": {"": "byte bytes", "1000": "KB"},
    "bit": {"": "bit bits"},
    "dollar": {"": "$ dollar dollars USD US\\$ usd 美元", "1/100": "¢ cent cents"},
    "euro": {"": "€ euro euros EUR"},
    "sterling": {"": "£ GBP 英镑", "1/100": "pence p"},
    **{sign: {"": sign} for sign in "₽ ₺ ₪ ₫ ₱ ₦ ₴ AUD CAD KRW kr".split()},
    "pound": {"": "lb lbs pound pounds 磅"},  # of either kind
    "yuan": {"": "¥ yuan CNY RMB 元 块 人民币", "1/10": "角"},
    "yen": {"": "yen JPY 日元"},
    "rupee": {"": "₹ rupee rupees Rs INR 卢比", "1/100": "paise"},
    "peso": {"": "peso pesos"},
    "won": {"": "₩ won"},
    "franc": {"": "franc francs CHF"},
}

_PREFIXES = {"p": -12, "n": -9, "μ": -6, "m": -3, "c": -2, "d": -1, "h": 2, "k": 3, "M": 6, "G": 9, "T": 12}
# Symbols with the prefixes that answers use. Rarer ones would let products of unknowns pass.
_PREFIXED = """
metre m n μ m c d k|gram g n μ m k|second s n μ m|litre L μ m c d k|litre l μ m c d k|newton N m k M|joule J m k M G
|watt W m k M G|watt-hour Wh k M G|volt V μ m k M|ampere A μ m k|coulomb C n μ m|farad F n μ p m|tesla T m μ|kelvin K m
|ohm Ω m k M|pascal Pa h k M G|hertz Hz k M G|electronvolt eV k M G|mole mol m μ k|calorie cal k|bar bar m
|byte B k M G T
"""
_SPELLED_PREFIXES = {
    **{"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1},
    **{"deca": 1, "deka": 1, "hecto": 2, "kilo": 3, "mega": 6, "giga": 9},
}
_SPELLED = """
metre meter metre|gram gram gramme|litre liter litre|second second|watt watt|volt volt|ampere amp ampere|joule joule
|newton newton|pascal pascal|byte byte|bit bit|calorie calorie|ohm ohm|coulomb coulomb|farad farad|tesla tesla
|electronvolt electronvolt|mole mole
"""

# A unit without a name equals any unit.
_PLAIN = "unit units 单位"

# Things that are counted, each a unit of its own, singular and plural.
_COUNTED = """
student students|person persons people 人 名|child children kid kids|boy boys|girl girls|man men|woman women
|adult adults|teacher teachers|member members|player players|worker workers|employee employees|friend friends
|team teams|game games|match matches|point points |goal goals|vote votes|ticket tickets 张|seat seats
|apple apples|orange oranges|banana bananas|egg eggs|cookie cookies|cake cakes|pie pies|pizza pizzas|candy candies
|slice slices|piece pieces 块儿|bag bags|box boxes|bottle bottles|can cans|jar jars|basket baskets
|book books 本|page pages 页|word words|letter letters|pen pens|pencil pencils 支|marker markers|paper papers
|card cards|stamp stamps|sticker stickers|coin coins|bill bills|penny pennies|nickel nickels|dime dimes
|toy toys|doll dolls
|marble marbles|ball balls|bead beads|block blocks|brick bricks|tile tiles|stick sticks|straw straws
|car cars 辆|bus buses|truck trucks|bike bikes bicycle bicycles|train trains|plane planes|ship ships|boat boats
|wheel wheels|house houses|room rooms|floor floors|table tables|chair chairs|door doors|window windows
|tree trees 棵|flower flowers 朵|plant plants|rose roses|seed seeds|leaf leaves
|animal animals|dog dogs|cat cats|bird birds|fish fishes|cow cows|horse horses|sheep|pig pigs|chicken chickens
|duck ducks|rabbit rabbits|goat goats|bee bees|ant ants|leg legs|head heads|eye eyes|tooth teeth
|side sides 边|edge edges|face faces|vertex vertices|corner corners|angle angles|diagonal diagonals|square squares
|triangle triangles|circle circles|rectangle rectangles|cube cubes|region regions|line lines|segment segments
|way ways 种|arrangement arrangements|combination combinations|permutation permutations|outcome outcomes
|possibility possibilities|choice choices|case cases|solution solutions 解|root roots|factor factors|divisor divisors
|number numbers|integer integers|prime primes|digit digits 位|term terms|element elements|subset subsets|value values
|answer answers|result results|question questions|problem problems|test tests
|item items 件|object objects 个 只|thing things|step steps|turn turns
|trip trips|lap laps|round rounds|mark marks|hit hits|shot shots|move moves|time times 次
|shirt shirts|shoe shoes|hat hats|sock socks|dress dresses|gift gifts|present presents|balloon balloons
|worksheet worksheets|class classes|row rows 行|column columns|group groups 组|stack stacks
|meal meals|sandwich sandwiches|visitor visitors|customer customers|passenger passengers|guest guests
|family families|household households
|atom atoms|molecule molecules|electron electrons|particle particles|cell cells|symbol symbols|song songs|movie movies
|video videos|photo photos|picture pictures|computer computers|phone phones|machine machines|robot robots
|bed beds|berry berries|building buildings|city cities|desk desks|dish dishes|dot dots|glass glasses|grape grapes
|ion ions|mango mangos mangoes|mouse mice|goose geese|neutron neutrons|proton protons|photon photons|notebook notebooks
|nut nuts|part parts|path paths|peach peaches|pear pears|polygon polygons|run runs|serving servings|set sets
|share shares|story stories|voter voters
|revolution revolutions rev|rotation rotations|cycle cycles|pass passes|inhabitant inhabitants|citizen citizens
"""

_UNITS: dict[str, Unit] = {name: Unit() for name in _PLAIN.split()}
for _base, _others in _BASES.items():
    for _factor, _names in _others.items():
        _UNITS |= dict.fromkeys(_names.split(), Unit(((_base, 1),), Fraction(_factor or "1")))
for _base, _symbol, *_prefixes in (line.split() for line in _PREFIXED.replace("\n", "").split("|")):
    _UNITS |= {f"{p}{_symbol}": Unit(((_base, 1),), Fraction(10) ** _PREFIXES[p]) for p in _prefixes}
for _base, *_names in (line.split() for line in _SPELLED.replace("\n", "").split("|")):
    for _prefix, _exponent in _SPELLED_PREFIXES.items():
        for _name in _names:
            _UNITS |= dict.fromkeys(
                (f"{_prefix}{_name}", f"{_prefix}{_name}s"), Unit(((_base, 1),), Fraction(10) ** _exponent)
            )
for _names in _COUNTED.replace("\n", "").split("|"):
    _UNITS |= dict.fromkeys(_names.split(), Unit(((_names.split()[0], 1),)))
_HOUR, _MILE, _KILOMETRE = _UNITS["h"], _UNITS["mi"], _UNITS["km"]
_UNITS |= {
    "mph": _MILE * _HOUR**-1,
    "kph": _KILOMETRE * _HOUR**-1,
    "kmph": _KILOMETRE * _HOUR**-1,
    "平方米": _UNITS["m"] ** 2,
    "平方厘米": _UNITS["cm"] ** 2,
    "平方分米": _UNITS["dm"] ** 2,
    "平方千米": _UNITS["km"] ** 2,
    "立方米": _UNITS["m"] ** 3,
    "立方厘米": _UNITS["cm"] ** 3,
    "立方分米": _UNITS["dm"] ** 3,
    "平方单位": Unit(),
    "立方单位": Unit(),
    "cc": _UNITS["cm"] ** 3,
}

# Adjectives before the name of a thing. None of these changes the number, as "more" would.
_QUALITIES = frozenset(
    "possible distinct different correct real complex positive negative integer whole prime odd even unique total such"
    " ordered equal full red blue green white black yellow orange pink purple brown gold silver small large big new"
    " old male female adult young nautical".split()
)

# Without `\text{}` these two letters are a unit and no product; `m` and `mg` might be either.
_BARE = frozenset("cm mm km kg ft kPa Hz mph USD RMB EUR GBP JPY CNY INR Rs lbs hrs min mins mL ml".split())

UNIT_NAMES = frozenset(_UNITS)
"""Every unit in any spelling, and every thing that is counted."""

SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "hundreds": 10**2,
    "thousands": 10**3,
    "millions": 10**6,
    "billions": 10**9,
    "trillions": 10**12,
    "dozen": 12,
    "lakh": 10**5,
    "crore": 10**7,
    "百": 10**2,
    "千": 10**3,
    "万": 10**4,
    "百万": 10**6,
    "千万": 10**7,
    "亿": 10**8,
}
"""Words behind a number that multiply it."""

CURRENCIES = frozenset("$ € £ ¥ ₹ ₩ USD EUR GBP JPY CNY RMB INR Rs CHF".split())
"""Currencies that may stand before their number."""

_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWERS_AFTER = {"squared": 2, "cubed": 3}


def unit_named(token: Token) -> Unit | None:
    """The unit that a token names, if it does."""
    name = token.text
    if token.kind == "letters" and name not in _BARE and (len(name) < 4 or name.lower() not in _UNITS):
        return None
    if token.kind == "number" or (token.kind == "command" and name != "\\Omega"):
        return None
    return _UNITS.get("Ω" if name == "\\Omega" else name) or (_UNITS.get(name.lower()) if len(name) > 2 else None)


def read_unit(tokens: list[Token]) -> Unit | None:
    """
    The unit that the tokens are: `cm`, `cm^2`, `square feet`, `m/s`, `dollars per day`. `None` if one of them is no
    part of a unit.
    """
    total, power, inverse, expected, position = Unit(), 1, False, True, 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if token.text == ".":
            continue
        if token.text in ("/", "per", "每") or token.text.lower() in ("a", "an", "each") and expected is False:
            if expected and (position > 1 or token.text == "/"):
                return None
            inverse, expected = True, True
        elif token.text in ("\\cdot", "*", "-") and not expected:
            expected = True
        elif token.text == "\\frac":
            above, position = _group(tokens, position)
            below, position = _group(tokens, position)
            parts = (read_unit(above), read_unit(below)) if above and below else (None, None)
            if None in parts:
                return None
            total, expected = total * parts[0] * parts[1] ** -1, False
        elif token.text.lower() in _QUALITIES and position < len(tokens):
            total = total * Unit(((token.text.lower(), 1),))
        elif token.text.lower() in _POWERS:
            power, expected = _POWERS[token.text.lower()], True
        elif (unit := unit_named(token)) is not None:
            exponent, position = _exponent(tokens, position)
            if exponent is None:
                return None
            total = total * unit ** (exponent * power * (-1 if inverse else 1))
            power, expected = 1, False
        else:
            return None
    return None if expected else total


def _group(tokens: list[Token], position: int) -> tuple[list[Token], int]:
    """The tokens in the braces that open here, and where the next token is."""
    texts = [token.text for token in tokens]
    if texts[position : position + 1] != ["{"] or "}" not in texts[position:]:
        return [], position
    end = texts.index("}", position)
    return tokens[position + 1 : end], end + 1


def _exponent(tokens: list[Token], position: int) -> tuple[int | None, int]:
    """The power behind a unit, 1 if there is none, and where the next token is."""
    if position < len(tokens) and tokens[position].text.lower() in _POWERS_AFTER:
        return _POWERS_AFTER[tokens[position].text.lower()], position + 1
    if position == len(tokens) or tokens[position].text != "^":
        return 1, position
    texts = [token.text for token in tokens[position + 1 : position + 5]]
    if texts and texts[0] == "{":
        if "}" not in texts:
            return None, position
        end = texts.index("}")
        inner, used = "".join(texts[1:end]), end + 1
    else:
        inner, used = "".join(texts[:1]), 1
    if inner.lstrip("-").isdigit() and len(inner) < 3 and inner.lstrip("-").isascii():
        return int(inner), position + 1 + used
    return None, position
