r"""Finds the option that a text states, by the words or the number of the option."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from .judge.units import CURRENCIES
from .markup import comparable
from .polarity import clause_before, is_doubted, is_negated
from .quantities import Quantity, read_quantity


_SENTENCE = re.compile(r"[^.!?]*(?:\.(?!\s|\Z)[^.!?]*)*(?:[.!?]+|\Z)")
_SINGLE_POWER = re.compile(r"\^\{(\w)\}")
# In front of an option that the sentence states: "it is a", "the answer:", "not 5 cm but".
_PREDICATE = re.compile(
    r"(?:\b(?:is|are|be|was|were|shows?|answer|equals|choose|pick|select|called)\b|'s\b|(?<!\b[a-z]):|[=→]|\bnot\b.*\bbut\b)\s*"
    r"(?:(?:a|an|the)\s+)?[\"'“‘]?\Z"
)
_END = re.compile(r"[\"'”’]?\s*(?:\Z|[.,;!:)]|-\s|\b(?:because|since|as|not|rather|instead)\b)")
# Such an option is a word of many sentences, or a number that counts something else: it must end its clause.
_COMMON = re.compile(r"yes|no|true|false|[^a-z]*|[0-9].*", re.DOTALL)
_CONDITION = re.compile(r"\b(?:if|when|suppose|assum\w+)\b")
_JOINED = re.compile(r"(?:[\s,/&]|\b(?:or|and|nor|maybe|perhaps|possibly|either|even)\b)*")
_VERB = re.compile(r"\s+(?:is|was|would|cannot|can't)\b")
_REFUSAL = re.compile(
    r"\b(?:(?:can|do|does|did|could|would)(?:\s+not|n't)|cannot|unable\s+to|impossible\s+to|not\s+possible\s+to|hard\s+to)"
    r"\s+(?:\w+\s+)?(?:determine|tell|see|view|say|answer|help|assist|know|decide|identify|access|have|provide|read"
    r"|conclude|verify|confirm)"
    r"|\b(?:sorry|unclear|insufficient|not\s+(?:enough|sure|provided|given|attached|visible|available)|no\s+(?:image|picture"
    r"|figure|photo|diagram|information|answer|conclusion))\b"
)
_RETRACTION = re.compile(r"\b(?:wait|oops|hmm|scratch\s+that|on\s+second\s+thought)\b")


def option_with_text(text: str, options: Mapping[str, str]) -> str | None:
    """The option that equals a text, apart from formatting, spaces and, if only one option is left, letter case."""
    wanted = _key(text)
    if not wanted:
        return None
    keys = {letter: _key(option) for letter, option in options.items()}
    exact = [letter for letter, key in keys.items() if key == wanted]
    if exact:
        return exact[0]  # a few questions list an option twice
    folded = [letter for letter, key in keys.items() if key.casefold() == wanted.casefold()]
    return folded[0] if len({keys[letter] for letter in folded}) == 1 else None


def option_with_number(text: str, options: Mapping[str, str]) -> str | None:
    """The only option with a text's number. The unit may be missing: 5 is 5 cm, but 5 m is not 5 cm, nor 12% 12."""
    number = read_quantity(text)
    if number is None:
        return None
    same = [letter for letter, option in options.items() if _is_same(number, read_quantity(option))]
    return same[0] if len(same) == 1 else None


def stated_option(line: str, options: Mapping[str, str]) -> str | None:
    """The only option that a line states: as a whole sentence, at its start ("Yes, ..."), or as its predicate."""
    line = comparable(line).casefold()
    texts = {letter: comparable(option).casefold() for letter, option in options.items()}
    texts = {letter: text for letter, text in texts.items() if text}
    if not texts or _REFUSAL.search(line) or _RETRACTION.search(line):
        return None
    # The longest first: "dark red" is no "red".
    alternatives = "|".join(re.escape(text) for text in sorted(set(texts.values()), key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)")
    stated: set[str] = set()
    for sentence in _SENTENCE.findall(line):
        if not sentence.rstrip().endswith("?"):
            stated |= _stated_in(sentence, list(pattern.finditer(sentence)))
    chosen = [letter for letter, text in texts.items() if text in stated]
    return chosen[0] if len(stated) == 1 else None


def _stated_in(sentence: str, found: Sequence[re.Match]) -> set[str]:
    joined = [False, *(_are_joined(*pair) for pair in pairwise(found)), False]
    return {match[0] for i, match in enumerate(found) if not (joined[i] or joined[i + 1]) and _is_stated(match)}


def _is_stated(match: re.Match) -> bool:
    before, after = match.string[: match.start()], match.string[match.end() :]
    clause, rest = clause_before(before), re.split("[,;]", after, maxsplit=1)[0]
    if (
        _CONDITION.search(before)
        or is_negated(clause)
        or is_doubted(clause)
        or is_negated(re.sub(r"\bnot\b.*", "", rest))
    ):
        return False
    ends = bool(_END.match(after))
    if not before.strip():
        return ends
    return bool(_PREDICATE.search(before)) and (ends or not _COMMON.fullmatch(match[0]))


def _are_joined(one: re.Match, other: re.Match) -> bool:
    """Whether two neighbours are alternatives: "red or blue"."""
    has_own_verdict = _VERB.match(one.string, other.end())
    return not has_own_verdict and _JOINED.fullmatch(one.string, one.end(), other.start()) is not None


def _is_same(number: Quantity, option: Quantity | None) -> bool:
    if option is None or number.unit not in ("", "°", option.unit) and number.unit not in CURRENCIES:
        return False
    values = {number.value / 100} if number.is_percent and not option.is_percent else {number.value}
    if option.is_percent and not number.is_percent:
        values.add(number.value * 100)
    return any(math.isclose(value, option.value) for value in values)


def _key(text: str) -> str:
    return _SINGLE_POWER.sub(r"^\1", "".join(comparable(text).split()))
