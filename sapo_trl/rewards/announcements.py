r"""
Finds the letter that a text announces as its answer, in English and in the commonest sentences of other languages.

The words before a letter ("the answer is B") or after it ("B is correct") announce it. An announcement does not count
in a question, with a negation or a doubt, or together with another letter. The last of several announcements counts.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .polarity import clause_before, is_condemned, is_doubted, is_negated


# In a long text only the last letters are read, each with so many characters around it.
_MAX_MENTIONS = 200
_MAX_WORDS = 160

# A letter that is not part of a word, a product or a formula such as `AB`, `A's`, `B = 3`, `A^2`, `C(n)`, `B-flat`.
_LETTER = re.compile(
    r"(?<![A-Za-z0-9À-ɏ_^\\'])(?<![^A-Za-z][A-Za-z0-9)] = )(?<![^A-Za-z][A-Za-z0-9)] =)(?<![^A-Za-z][A-Za-z0-9)]=)"
    r"(?P<open>[\[({\"'“‘「『【《]{0,3})[ \t]?(?<![A-Za-z0-9À-ɏ_^\\])(?P<letter>[A-Za-z0-9])"
    r"(?![A-Za-z0-9À-ɏ_^°(♭♯]|'[A-Za-z]|\+\+|:[A-Z]|\s*[=<>≤≥≠×÷∪∩∧∨±≈]|[-\\+*/|][A-Za-z0-9(]{2})"
    r"(?P<close>[ \t]?[\])}\"'”’」』】》]{1,3})?"
)
_QUOTES = " \t\"'“‘”’"
# "A triangle": a word follows, so this is the article, or the pronoun "I". Before the words below it is a letter.
_ARTICLES = ("A", "I")
_WORD_FOLLOWS = re.compile(
    r"[ \t]+(?!(?:because|since|as|and|or|with|which|for|by|based|from|not|is|are|isn't|instead|oder|und|ou|et|o|y|e"
    r"|to)\b)[A-Za-z0-9]"
)
# `B.` may be a label; "e.g." and decimals end no sentence.
_SENTENCE = re.compile(r"[^.!?\n]*(?:\.(?!\s|\Z)[^.!?\n]*)*(?:[.!?]+|\n|\Z)")
# A line with such an end continues in the next line: "Answer:\n\nB".
_GOES_ON = re.compile(r"(:|=|\bis|\banswer|答案|选|選)[ \t]*\n\s*", re.IGNORECASE)

_LINK = r"(?:(?:\b(?:is|are|be|equals|was|were)(?:n't)?\b|'s\b|[:=]|\s-+|[-=]>|[→⇒])[\s,]*)+"
_FILL = (
    r"(?:\b(?:option|choice|letter|answer|definitely|clearly|certainly|simply|indeed|thus|therefore|then|obviously|also"
    r"|actually|now|just|likely|most|probably|surely|only|not|never|no\s+longer|either|both|neither|the|la|le|die|el)\b"
    r"[\s:,]*){0,4}"
)
_GOOD = r"(?:correct|right|best|final|chosen|my|our)"
_FROM = (
    r"(?:^|\b(?:so|therefore|thus|hence|is|be|to|with|as|means|match(?:es)?|gives(?:\s+us)?|leaves)\b[\s,:]*|'s\s+"
    r"|[→⇒=]\s*)"
)
_WHO = (
    r"(?:^|[,;:]|\b(?:i|we|let's|me|us|would|will|must|should|to|so|therefore|thus|hence|then|can|have|and)[\s,]"
    r"|'d\s|'ll\s)\s*"
)


@dataclass(frozen=True)
class _Cue:
    """Words before a letter that announce it. Some announce it only if it is in brackets."""

    pattern: re.Pattern
    needs_brackets: bool = False


def _in_front(pattern: str, needs_brackets: bool = False) -> _Cue:
    return _Cue(re.compile(rf"(?:{pattern})[^\w.,;!?]{{0,12}}\Z", re.IGNORECASE), needs_brackets)


_STRONG = (
    _in_front(rf"\b(?:answers?|solution)\b.{{0,60}}?{_LINK}{_FILL}"),
    _in_front(r"\b(?:answers?|ans)"),
    _in_front(rf"\b(?:option|choice|letter|{_GOOD}\s+(?:one|statement|figure|picture))\s*{_LINK}{_FILL}"),
    _in_front(rf"\b{_GOOD}\s+(?:option|choice|letter)\s*[:=-]\s*{_FILL}"),
    _in_front(rf"{_WHO}(?:choose|chose|select|pick|go\s+with|going\s+with|opt\s+for|selected|picked)\b\s*{_FILL}"),
    _in_front(rf"{_FROM}(?:the\s+)?(?:{_GOOD}\s+)?(?:answer\s+)?(?:option|choice|letter)"),
    # Chinese, Japanese, Korean
    _in_front(r"(?:答案|答え|正解|正答|정답|답)[^A-Za-z]{0,12}"),
    _in_front(r"(?:选|選)(?:择|擇|项|項)?(?:是|为|為|了)?"),
    # Spanish, French, German, Portuguese, Italian, Dutch, Swedish, Polish, Russian, Turkish, Indonesian, Vietnamese
    _in_front(
        r"\b(?:respuesta|opción\s+correcta|réponse|antwort|lösung|resposta|risposta|antwoord|svaret?|odpowied[zź]|ответ"
        r"|cevap|jawaban|đáp\s+án)\b.{0,30}"
    ),
)
_WEAK = (
    _in_front(
        r"(?:^|[\s,;:])(?:so|thus|hence|therefore|it's|it\s+is|that's|that\s+is|must\s+be|has\s+to\s+be)[\s,:]*"
        rf"(?:(?:it's|it\s+is|it\s+must\s+be|we\s+get|this\s+is|must\s+be)\s+)?{_FILL}"
    ),
    _in_front(r"\b(?:is|be)|[=→⇒]", needs_brackets=True),
)
_BEHIND = re.compile(
    r"\s*(?:is|must\s+be|should\s+be)\s+(?:(?:the|a)\s+)?(?:(?:only|best|most)\s+)?"
    r"(?:correct|right|best|true|answer|solution)(?:\s+(?:answer|option|choice|one|letter))?"
    r"\s*(?:\Z|[.,;!:]|\b(?:because|since|as|and|here)\b)"
    r"|\s*(?:选项|選項|项|項)?\s*(?:是|为|為)?(?:正确|正確|对的|對的|正しい)"
    r"|\s*が(?:正解|正しい)|\s*[가이]\s*정답",
    re.IGNORECASE,
)

_NEGATION_BEHIND = re.compile(
    r"\s*(?:가|이|은|는)?\s*(?:아니|아닙|않)|\s*(?:では|じゃ)(?:な|あり)|\s*(?:选项|項|项)?(?:是|有)?[不错錯误誤]"
)
_ANSWER = re.compile(r"\b(?:answers?|ans|solution|choose|chose|select|pick|go(?:ing)?\s+with)\b", re.IGNORECASE)
_FALSE = re.compile(r"\W*false\W*\Z", re.IGNORECASE)
_CLOSES = re.compile(r"\s*(?:\Z|[.,;:!)]|(?:because|since)\b)")
_VERB = re.compile(
    r"\s*(?:(?:is|was|isn't|wasn't|can|cannot|can't|could|would|does|doesn't|has|had|gives|seems|looks"
    r"|fails|must|should|es|est|ist|é|è|är)\b|是|选项是|项是)"
)
_END = re.compile(
    r"\s*(?:\Z|[.,;!/&(]|:(?!\S)|(?:because|since|as|and|or|for|here|which|where|not|instead|rather|indeed)\b|[-=]>|-\s"
    r"|选项|選項|项|項|で|だ|입|이|가|[和与與或及跟还還])"
)
_CONNECTOR = re.compile(
    r"(?:[\s,/&+;|.和与與或及跟-]|还是|還是|以及|\b(?:and|or|und|oder|et|ou|y|o|e|и|или|nor|to|through|versus|vs|also|maybe"
    r"|perhaps|possibly|option|choice|even|both|either)\b)*"
)
# With these between two letters, the second is no second answer.
_CONTRAST = re.compile(
    r"\b(?:not|than|of|unlike|over|but|because|since|while|whereas|as|eliminat\w*|exclud\w*|rul\w*|so|against|where|with|at|in"
    r"|is|are|be)\b",
    re.IGNORECASE,
)
_RETRACTION = re.compile(
    r"\b(?:that|this|which)(?:'s|\s+(?:is|was|seems|can't\s+be|cannot\s+be))\s+(?:\w+\s+){0,2}?"
    r"(?:wrong|incorrect|false|impossible|not\s+(?:right|correct|true|possible|it)|mistaken?|error)\b|\bi\s+was\s+wrong\b"
    r"|\bscratch\s+that\b|\bchanged\s+my\s+mind\b|\bmade\s+a\s+mistake\b",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:no|wait|oops|hmm|sorry|actually|correction|i\s+mean|rather|make\s+that)\b[\s,.:-]*"
    r"(?:(?:no|wait|it's|it\s+is|option)\b[\s,]*){0,3}[(\"']?(?-i:[A-Z])(?![A-Za-z0-9'])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Announcement:
    """The letter that a text announces, if any. If it is not settled, other signs may decide."""

    letter: str | None
    is_settled: bool


@dataclass(frozen=True)
class _Mention:
    """A letter, the words of its sentence around it, and whether it is one of several: `A or B`."""

    letter: str
    before: str
    after: str
    end: int
    in_brackets: bool
    is_alternative: bool


def announcement(text: str, letters: Sequence[str]) -> Announcement:
    r"""
    Read the announcement in a text.

    Args:
        text (`str`):
            Plain text, without fonts and Markdown.
        letters (`Sequence[str]`):
            Letters (or digits) that may be chosen, in upper case.

    Example:

    ```python
    >>> from sapo_trl.rewards.announcements import announcement

    >>> announcement("It cannot be A, so the answer is B.", "ABCD").letter
    'B'
    >>> announcement("The answer is A or B.", "ABCD").letter
    ```
    """
    text = _GOES_ON.sub(r"\1 ", text)
    mentions = [mention for sentence in _SENTENCE.finditer(text) for mention in _mentions(sentence, letters)]
    mentions = mentions[-_MAX_MENTIONS:]
    strong = _decided(text, mentions, letters, _STRONG, _BEHIND)
    return strong if strong.is_settled else _decided(text, mentions, letters, _WEAK)


def has_correction(text: str, start: int, end: int) -> bool:
    """Whether a part of a text goes over to another letter: `no, B`, `actually (B)`."""
    return _CORRECTION.search(text, start, end) is not None


def _decided(
    text: str,
    mentions: Sequence[_Mention],
    letters: Sequence[str],
    in_front: Sequence[_Cue],
    behind: re.Pattern | None = None,
) -> Announcement:
    chosen, letter = -1, None
    for i, mention in enumerate(mentions):
        if not _is_announced(mention, in_front, behind):
            continue
        clause = clause_before(mention.before)
        if is_negated(clause) or _NEGATION_BEHIND.match(mention.after):
            letter = None if mention.letter == letter else letter
        elif not is_doubted(clause):
            chosen, letter = i, None if mention.is_alternative else mention.letter
    if chosen >= 0:
        start = mentions[chosen].end
        # The text after the next letter is about that letter.
        end = mentions[chosen + 1].end if chosen + 1 < len(mentions) else len(text)
        end = min(end, start + _MAX_WORDS)
        if _RETRACTION.search(text, start, end) or has_correction(text, start, end):
            letter = None
    return Announcement(letter if letter is not None and letter in letters else None, is_settled=chosen >= 0)


def _is_announced(mention: _Mention, in_front: Sequence[_Cue], behind: re.Pattern | None) -> bool:
    if behind is not None and behind.match(mention.after):
        return True
    if _VERB.match(mention.after):
        return False
    # "Option B: false", while "the answer is (B) false" has the option's text.
    if not _ANSWER.search(mention.before) and (is_condemned(mention.after) or _FALSE.match(mention.after)):
        return False
    if not mention.in_brackets and not _END.match(mention.after):
        return False
    return any(cue.pattern.search(mention.before) for cue in in_front if mention.in_brackets or not cue.needs_brackets)


def _mentions(sentence: re.Match, letters: Sequence[str]) -> Iterator[_Mention]:
    """The letters in a sentence. A question has none, because it announces nothing."""
    text = sentence[0]
    if text.rstrip().endswith("?"):
        return
    found = [match for match in _LETTER.finditer(text) if _is_label(match, letters)]
    follows = [*(_has_alternative(*pair) for pair in pairwise(found)), False]
    precedes = [False, *(_are_connected(*pair) for pair in pairwise(found))]
    for i, match in enumerate(found):
        yield _Mention(
            letter=match["letter"].upper(),
            before=text[max(0, match.start() - _MAX_WORDS) : match.start()],
            after=text[match.end() : match.end() + _MAX_WORDS],
            end=sentence.start() + match.end(),
            in_brackets=_in_brackets(match),
            is_alternative=follows[i] or precedes[i],
        )


def _is_label(match: re.Match, letters: Sequence[str]) -> bool:
    letter = match["letter"]
    if "'" in (match["close"] or "") and "'" not in match["open"]:  # A', of a figure
        return False
    if letter.isdigit() or letter.islower():
        closes = letter.isdigit() or _in_brackets(match) or _CLOSES.match(match.string, match.end())
        return letter.upper() in letters and bool(closes)
    return _in_brackets(match) or letter not in _ARTICLES or not _WORD_FOLLOWS.match(match.string, match.end())


def _in_brackets(match: re.Match) -> bool:
    return bool(match["open"].strip(_QUOTES) or (match["close"] or "").strip(_QUOTES))


def _has_alternative(one: re.Match, other: re.Match) -> bool:
    """Whether the next letter is a second answer: `A or B`, `(A) 3 (B) 4`."""
    text = one.string
    if one["letter"].upper() == other["letter"].upper():
        return False
    has_own_verdict = _VERB.match(text, other.end()) and not _BEHIND.match(text, other.end())
    return not has_own_verdict and not _CONTRAST.search(text, one.end(), other.start())


def _are_connected(one: re.Match, other: re.Match) -> bool:
    return _has_alternative(one, other) and bool(_CONNECTOR.fullmatch(one.string, one.end(), other.start()))
