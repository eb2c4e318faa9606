"""
Expressions read from tokens.

Letters in upper and lower case are two unknowns; `e`, `i` and `π` are the constants. An expression with two readings
(`1/2x`, `\\sqrt 12`, `2\\frac{3}{2}`) is unreadable.
"""

from __future__ import annotations

from fractions import Fraction

from .nodes import Node, letter
from .tokens import Token, UnreadableError


MAX_DEPTH = 40
GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma tau"
    " upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell hbar".split()
)
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp max min gcd lcm".split()
)
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "tg": "tan"}
_APPLIED = frozenset("fghFGHP")
"""Letters that name a function where a single argument in parentheses follows."""
_ADDITIVE = {"+": 1, "-": -1, "\\pm": 0, "\\mp": 0}
_PRODUCTS = ("*", "\\cdot", "\\times", "\\ast")
_QUOTIENTS = ("/", "\\div")
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_BARS = ("|", "\\vert", "\\lvert", "\\rvert", "\\mid")
_FRACTIONS = ("\\frac", "\\dfrac", "\\tfrac", "\\cfrac")
_MATRICES = ("matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array")


def parsed(tokens: list[Token]) -> Node:
    """
    The tree of an expression.

    Raises:
        UnreadableError: if the tokens are no expression, or have two readings.
    """
    parser = _Parser(tokens)
    node = parser.sum()
    if parser.position < len(tokens):
        raise UnreadableError(f"`{tokens[parser.position].text}` is left over")
    return node


class _Parser:
    def __init__(self, tokens: list[Token]):
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.bars = 0
        self.factors = 0

    def peek(self, ahead: int = 0) -> Token | None:
        position = self.position + ahead
        return self.tokens[position] if position < len(self.tokens) else None

    def text(self, ahead: int = 0) -> str:
        token = self.peek(ahead)
        return token.text if token else ""

    def take(self, expected: str | None = None) -> Token:
        token = self.peek()
        if token is None or (expected is not None and token.text != expected):
            raise UnreadableError(f"`{expected or 'more'}` is missing")
        self.position += 1
        return token

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("too deep")
        terms = []
        while not terms or self.text() in _ADDITIVE:
            sign = self.take().text if self.text() in _ADDITIVE else "+"
            while self.text() in ("+", "-") and sign in ("+", "-"):
                sign = "-" if (self.take().text == "-") != (sign == "-") else "+"
            term = self.product()
            terms.append(term if sign == "+" else ("negative", term) if sign == "-" else (sign, term))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("sum", *terms)

    def product(self) -> Node:
        node = self.implicit_product()
        while self.text() in _PRODUCTS or self.text() in _QUOTIENTS:
            divides = self.take().text in _QUOTIENTS
            negative = False
            while self.text() in ("+", "-"):
                negative ^= self.take().text == "-"
            start = self.position
            factor = self.implicit_product()
            run = self.tokens[start].kind == "letters" and factor[0] == "product"  # a/bc
            if divides and (self.factors > 1 or run):
                raise UnreadableError("a factor behind a slash may belong above or below it")
            if divides and self.tokens[start].kind == "number" and factor[0] == "sum":
                raise UnreadableError("a mixed number behind a slash")
            factor = ("negative", factor) if negative else factor
            node = ("quotient", node, factor) if divides else ("product", node, factor)
        return node

    def implicit_product(self) -> Node:
        factors = [self.power()]
        while self.starts_factor():
            token, before = self.peek(), self.tokens[self.position - 1]
            if self.runs_on(token, before, factors[-1]):
                raise UnreadableError("braces do not show: 3{4} looks like 34")
            if token.kind == "number" and not (mixed := self.mixed(factors, before)):
                raise UnreadableError("two numbers side by side")
            elif token.kind == "number":
                factors[-1] = ("sum", factors[-1], mixed)
            elif before.kind == "number" and token.text in _FRACTIONS:
                fraction = self.power()
                whole = fraction[1:]
                if fraction[0] == "quotient" and all(part[0] == "number" for part in whole):
                    if before.value.denominator != 1 or len(factors) > 1 or not 0 < whole[0][1] < whole[1][1]:
                        raise UnreadableError("neither a mixed number nor a product")
                    factors[-1] = ("sum", factors[-1], fraction)
                else:
                    factors.append(fraction)
            else:
                factors.append(self.power())
        self.factors = len(factors)
        return factors[0] if len(factors) == 1 else ("product", *factors)

    def runs_on(self, token: Token, before: Token, factor: Node) -> bool:
        """Whether braces alone part two numbers, or a number and a fraction."""
        after = self.peek(1)
        if token.text == "{" and after is not None:
            return after.kind == "number" or after.text in _FRACTIONS
        return token.text in _FRACTIONS and before.text == "}" and factor[0] == "number"

    def mixed(self, factors: list[Node], before: Token) -> Node | None:
        """The fraction of a mixed number in plain text, `3 1/2`, if it is one."""
        numerator, denominator = self.peek(), self.peek(2)
        if not (
            len(factors) == 1
            and before.kind == "number"
            and self.text(1) == "/"
            and denominator is not None
            and denominator.kind == "number"
            and all(x.value.denominator == 1 for x in (before, numerator, denominator))
            and 0 < numerator.value < denominator.value
        ):
            return None
        self.position += 3
        return ("quotient", ("number", numerator.value), ("number", denominator.value))

    def starts_factor(self) -> bool:
        token = self.peek()
        if token is None:
            return False
        if token.kind in ("number", "letters", "word"):
            return True
        text = token.text
        if text in _BARS:
            return not self.bars and text != "\\rvert"
        if token.kind == "command":
            return text not in (*_ADDITIVE, *_PRODUCTS, *_QUOTIENTS, "\\rfloor", "\\rceil", "\\circ", "\\end", "\\mod")
        return text in ("(", "[", "{")

    def power(self) -> Node:
        node = self.postfix(self.primary())
        while self.text() == "^":
            node = self.postfix(self.raised(node))
        return node

    def raised(self, base: Node) -> Node:
        self.take("^")
        if self.text() == "\\circ" or [self.text(k) for k in range(3)] == ["{", "\\circ", "}"]:
            self.position += 1 if self.text() == "\\circ" else 3
            return ("product", base, ("constant", "degree"))
        if (self.peek() and self.peek().text in ("\\prime", "'")) or self.text(1) == "\\prime":
            raise UnreadableError("a prime")
        return ("power", base, self.exponent())

    def exponent(self) -> Node:
        if self.text() == "-":  # 10^-3
            self.take()
            return ("negative", self.exponent())
        token = self.peek()
        if token and token.kind in ("letters", "word") and len(token.text) > 1:
            return self.single_letter()
        return self.primary()

    def postfix(self, node: Node) -> Node:
        while True:
            text = self.text()
            if text == "!":
                self.take()
                if self.text() == "!":
                    raise UnreadableError("a double factorial")
                node = ("factorial", node)
            elif text == "%":
                self.take()
                node = ("percent", node)
            elif text in ("\\circ", "\\degree"):
                self.take()
                node = ("product", node, ("constant", "degree"))
            elif text in ("'", "\\prime"):
                raise UnreadableError("a prime")
            else:
                return node

    def primary(self) -> Node:
        token = self.take()
        text = token.text
        if token.kind == "number":
            return ("number", token.value)
        if token.kind == "word":
            return self.word(text)
        if token.kind == "letters":
            return self.letters(text)
        if text in ("(", "[", "{", "\\lfloor", "\\lceil"):
            node = self.sum_inside(text)
            return (text[1:], node) if text[0] == "\\" else node
        if text in _BARS and not self.bars:
            self.bars += 1
            node = self.sum()
            if self.take().text not in _BARS:
                raise UnreadableError("a bar is missing")
            self.bars -= 1
            return ("absolute", node)
        if token.kind == "command":
            return self.command(text[1:])
        raise UnreadableError(f"`{text}`")

    def sum_inside(self, opening: str) -> Node:
        bars, self.bars = self.bars, 0
        node = self.sum()
        self.take(_CLOSING[opening])
        self.bars = bars
        return node

    def command(self, name: str) -> Node:
        if name == "pi":
            return ("constant", "pi")
        if name == "infty":
            return ("constant", "infinity")
        if name in GREEK:
            return self.symbol("\\" + name.removeprefix("var"))
        if "\\" + name in _FRACTIONS:
            return ("quotient", self.argument(), self.argument())
        if name in ("binom", "dbinom", "tbinom"):
            return ("binomial", self.argument(), self.argument())
        if name == "sqrt":
            return self.root()
        if name in FUNCTIONS:
            return self.function(name)
        if name == "begin":
            return self.determinant()
        raise UnreadableError(f"the command {name}")

    def argument(self) -> Node:
        r"""A group, or a single digit or letter as in `\frac12`."""
        token = self.peek()
        if token and token.text == "{":
            self.take()
            return self.sum_inside("{")
        if token and token.kind == "number":
            return self.digit(token)
        if token and token.kind in ("letters", "word"):
            return self.single_letter()
        if token and token.kind == "command":
            return self.primary()
        raise UnreadableError("an argument is missing")

    def digit(self, token: Token) -> Node:
        if not token.text.isdigit():
            raise UnreadableError("a number without braces")
        first, rest = token.text[0], token.text[1:]
        if len(rest) > 1:
            raise UnreadableError("a number without braces")
        if rest:
            self.tokens = [*self.tokens]
            self.tokens[self.position] = Token("number", rest, False, Fraction(rest))
            before = self.tokens[self.position - 1].text
            if before not in _FRACTIONS and not before.endswith("binom"):
                raise UnreadableError("a number without braces")
        else:
            self.position += 1
        return ("number", Fraction(first))

    def single_letter(self) -> Node:
        """The next letter of a run of them: `x` of `xy`."""
        token = self.peek()
        first, rest = token.text[0], token.text[1:]
        self.tokens = [*self.tokens]
        if rest:
            self.tokens[self.position] = Token(token.kind, rest)
        else:
            self.position += 1
        return letter(first)

    def root(self) -> Node:
        degree: Node = ("number", Fraction(2))
        if self.text() == "[":
            self.take()
            degree = self.sum_inside("[")
        if self.text() == "(":  # plain text
            self.take()
            return ("root", degree, self.sum_inside("("))
        token = self.peek()
        if token is not None and token.kind == "number" and len(token.text) > 1:
            raise UnreadableError("the root of the first digit or of all")
        return ("root", degree, self.argument())

    def function(self, name: str) -> Node:
        name = _ALIASES.get(name, name)
        base: Node | None = None
        exponent: Node | None = None
        while self.text() in ("^", "_"):
            if self.take().text == "_":
                base = self.argument()
            else:
                exponent = self.exponent()
        if exponent == ("negative", ("number", Fraction(1))):
            if name not in _INVERSE:
                raise UnreadableError("an inverse function")
            name, exponent = _INVERSE[name], None
        if name in ("max", "min", "gcd", "lcm"):
            return (name, *self.arguments())
        if self.text() in ("(", "["):
            argument = self.primary()
        else:
            factors = []
            negative = self.text() == "-" and bool(self.take())
            while not factors or (self.starts_factor() and self.text() != "(" and not self.is_function()):
                factors.append(self.power())
            argument = factors[0] if len(factors) == 1 else ("product", *factors)
            argument = ("negative", argument) if negative else argument
        if name == "log":
            # Of an unknown base: log 100 may be 2 or 4.6.
            base = base or ("symbol", "the base of log")
            node: Node = ("quotient", ("ln", argument), ("ln", base))
        elif base is not None:
            raise UnreadableError("a subscript of a function")
        elif name == "lg":
            node = ("quotient", ("ln", argument), ("ln", ("number", Fraction(10))))
        elif name == "exp":
            node = ("power", ("constant", "e"), argument)
        else:
            node = (name, argument)
        return node if exponent is None else ("power", node, exponent)

    def is_function(self) -> bool:
        token = self.peek()
        return token.text.removeprefix("\\") in FUNCTIONS

    def arguments(self) -> list[Node]:
        self.take("(")
        found = [self.sum()]
        while self.text() == ",":
            self.take()
            found.append(self.sum())
        self.take(")")
        return found

    def word(self, text: str) -> Node:
        if len(text) == 1:
            return self.applied(text) or self.symbol(text)
        if text in FUNCTIONS or text in _ALIASES:
            return self.function(text)
        raise UnreadableError(f"the word {text}")

    def letters(self, text: str) -> Node:
        if len(text) == 1:
            return self.applied(text) or self.symbol(text)
        if text in FUNCTIONS or text in _ALIASES:
            return self.function(text)
        if text == "sqrt":
            return self.root()
        if text == "pi":
            return ("constant", "pi")
        if text in ("inf", "infty", "infinity", "oo"):
            return ("constant", "infinity")
        if text in GREEK and len(text) > 2:
            return self.symbol("\\" + text)
        for name in ("sin", "cos", "tan", "ln", "log"):
            if text.startswith(name) and len(text) == len(name) + 1 and self.text() != "(":
                self.position -= 1
                self.tokens = [*self.tokens]
                self.tokens[self.position] = Token("letters", text[-1])
                return self.function(name)
        if len(text) > 3 or "pi" in text:
            raise UnreadableError(f"the word {text}")
        return ("product", *(letter(each) for each in text[:-1]), self.symbol(text[-1]))

    def symbol(self, name: str) -> Node:
        """A symbol with its subscript, or a constant."""
        if self.text() != "_":
            return letter(name)
        self.take()
        if self.text() == "{":
            self.take()
            depth, inner = 1, []
            while depth:
                token = self.take()
                depth += {"{": 1, "}": -1}.get(token.text, 0)
                inner.append(token.text)
            subscript = " ".join(inner[:-1])
        else:
            token = self.peek()
            if token is not None and token.kind in ("letters", "number") and len(token.text) > 1:
                raise UnreadableError("a subscript of several characters without braces")
            subscript = self.take().text
        return ("symbol", f"{name}_{subscript}")

    def applied(self, name: str) -> Node | None:
        """A value of an unknown function, `f(2)`."""
        closing = self.text(2) == ")" or (self.text(1) == "-" and self.text(3) == ")")
        if name not in _APPLIED or self.text() != "(" or not closing:
            return None
        self.take()
        return ("apply", name, self.sum_inside("("))

    def determinant(self) -> Node:
        name, rows = self.matrix_rows()
        if name != "vmatrix":
            raise UnreadableError("a matrix in an expression")
        if any(len(row) != len(rows) for row in rows) or len(rows) > 5:
            raise UnreadableError("no square matrix")
        return ("determinant", *(("row", *(parsed(entry) for entry in row)) for row in rows))

    def matrix_rows(self) -> tuple[str, list[list[list[Token]]]]:
        end = self.position
        while end < len(self.tokens) and self.tokens[end].text != "\\end":
            end += 1
        name, rows = matrix_of(self.tokens[self.position - 1 : end + 4])
        self.position = end + 4
        return name, rows


def matrix_of(tokens: list[Token]) -> tuple[str, list[list[list[Token]]]]:
    r"""The name of an environment `\begin...\end` and its entries row by row, if the tokens are one and no more."""
    texts = [token.text for token in tokens]
    if len(texts) < 8 or texts[0] != "\\begin" or texts[1] != "{" or texts[3] != "}" or texts.count("\\begin") != 1:
        raise UnreadableError("no matrix")
    name = texts[2]
    if texts[-4:] != ["\\end", "{", name, "}"] or name not in (*_MATRICES, "vmatrix"):
        raise UnreadableError("no matrix")
    start = 4
    if name == "array":
        start = texts.index("}", 4) + 1 if "}" in texts[4:] else 4
    rows: list[list[list[Token]]] = [[[]]]
    depth = 0
    for token in tokens[start:-4]:
        depth += (token.text == "{") - (token.text == "}")
        if token.text == "&" and not depth:
            rows[-1].append([])
        elif token.text == "\\\\" and not depth:
            rows.append([[]])
        else:
            rows[-1][-1].append(token)
    if rows[-1] == [[]]:
        rows.pop()
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise UnreadableError("no matrix")
    return name, rows
