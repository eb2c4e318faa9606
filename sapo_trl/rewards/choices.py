r"""
Reward for the right letter of a multiple choice question, and the rules that read a letter from a response.

Prompts ask for a box, so a box has priority over the text around it. Without a box, the surest of these signs decides:
an announcement ("the answer is B"), a line that is a letter or starts with a marked letter ("B. 12 cm"), an option's
text in the last line ("It is a circle"). Nothing else is an answer: a letter is never guessed, and a letter that is
negated, doubted, or one of several is not chosen.
"""

import re
import string
from collections.abc import Mapping, Sequence
from functools import partial

from .announcements import announcement, has_correction
from .completion import Completion, answer_part, completion_text, sole_answer
from .markup import comparable, unformatted
from .option_texts import option_with_number, option_with_text, stated_option
from .polarity import is_condemned


DEFAULT_LETTERS = string.ascii_uppercase[:10]

# The answer stands at the beginning or the end. The middle of a longer response is not searched for words.
_MAX_CHARACTERS = 4_000

_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z_ ]{1,20}>")
_OPENING, _CLOSING = r"[\s({\[\"'“‘「『【《]*", r"[\s)}\]\"”’」』】》.:,]*"
_LETTER_ALONE = re.compile(rf"{_OPENING}([A-Za-z0-9])(?:(?<='.)')?(?:选项|選項|项|項)?{_CLOSING}\\?")
# "(B) 12", "B.12", "B: 12", "B - 12", "B, since"; not "B.M." and "B-flat".
_LABEL = re.compile(
    rf"{_OPENING}([A-Z0-9])(?:\s*[)\]}}]\s*[.:]?|\s*:|\.(?![A-Za-z]\.)|,(?=\s*[0-9])|\s+(?:-+|->|→)(?=\s)|\s+(?=\()"
    r"|(?=,?\s+(?:because|since|not)\b),?)\s*"
)
_OTHER_LABEL = re.compile(r"[(\[]([A-Z])[)\]]|(?<![A-Za-z0-9])([A-Z])[.):](?=\s|\Z)")
# After a label: a second letter, or a verb about the option instead of the option's text.
_NO_TEXT = re.compile(
    r"\s*(?:(?:,|/|&|\+|;|and\b|or\b)\s*)*[(\[]?[A-Z](?![A-Za-z0-9'])(?!\s+[a-z])"
    r"|\s*(?:(?:is|are|was|isn't|cannot|can't|can|could|would|may|might|must|should|will|won't|does|doesn't|has|had"
    r"|fails|seems|looks|gives|or|and|never|almost|nearly|hardly|barely|only\s+(?:if|when|for)|however|on\s+the\s+other\s+hand|by\s+contrast)\b"
    r"|[是不错錯])"
)
_NOT_ANOTHER = re.compile(r"not\s+\(?[A-Z](?![A-Za-z0-9'])")  # "B, not A"
_FORMULA = re.compile(r"[0-9]|\\(?!neg|lnot|not|ne|lor|land|vee|wedge|cup|cap|sim)[a-zA-Z]+")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")


def extract_choice(text: str, letters: Sequence[str], options: Sequence[str] | None = None) -> str | None:
    r"""
    The letter that a response chooses.

    Args:
        text (`str`):
            The response. Its thinking is not read.
        letters (`Sequence[str]`):
            Letters (or digits) that may be chosen, in upper case: `"ABCD"`.
        options (`Sequence[str]`, *optional*):
            The option of each letter. A box or a last line with the text of one option chooses this option. So does a
            box with the option's number in another notation.

    Returns:
        `str` or `None`: One of `letters`, or `None` if the response chooses none of them.

    Example:

    ```python
    >>> from sapo_trl.rewards.choices import extract_choice

    >>> extract_choice(r"It is not (A), so \boxed{B}.", "ABCD")
    'B'
    >>> extract_choice("A triangle has three sides.", "ABCD")
    ```
    """
    if options is not None and len(options) != len(letters):
        raise ValueError(f"{len(letters)} `letters` came with {len(options)} `options`; one each is needed.")
    texts = dict(zip(letters, options or (), strict=options is not None))
    text = answer_part(text)
    box = sole_answer(text)
    if (box is None and "\\boxed" in text) or (box and len(box) > _MAX_CHARACTERS):
        return None
    chosen = _in_box(box, letters, texts) if box else None
    # Without known options, a formula is not a choice, but a step of the solution.
    if not box or (chosen is None and not texts and _is_formula(box)):
        return _in_words(text, letters, texts)
    return chosen


def multiple_choice_reward(
    completions: list[Completion],
    answer: list[str | None],
    choices: list[Sequence[str] | None] | None = None,
    **kwargs,
) -> list[float | None]:
    r"""
    1.0 for each completion that chooses the right letter, else 0.0.

    Args:
        completions (`list`):
            Completions, each a string or a list of messages.
        answer (`list[str | None]`):
            Right letters: `B`, or `(B)`. A row with `None` has no answer to compare with.
        choices (`list`, *optional*):
            Options of each question, beginning with the option `A`. Without options, the letters `A` to `J` may be
            chosen.
        **kwargs:
            The trainer's other columns, unused.

    Returns:
        `list[float | None]`: One reward per completion. A row without an answer has `None`, which means "does not
        apply" to TRL.

    Example:

    ```python
    >>> from sapo_trl.rewards.choices import multiple_choice_reward

    >>> multiple_choice_reward(completions=[r"So \boxed{B}", "Answer: (C)"], answer=["B", "B"])
    [1.0, 0.0]
    ```
    """
    choices = choices if choices is not None else [None] * len(completions)
    if not len(completions) == len(answer) == len(choices):
        raise ValueError(
            f"{len(completions)} completions came with {len(answer)} values of `answer` and {len(choices)} of "
            "`choices`; one each is needed."
        )
    rewards: list[float | None] = []
    for completion, gold, options in zip(completions, answer, choices, strict=True):
        if gold is None:
            rewards.append(None)
            continue
        letters = DEFAULT_LETTERS if options is None else letters_of(options)
        right = _letter_alone(str(gold), letters)
        if right is None:
            raise ValueError(f"`answer` must be one of the letters {letters}, got {gold!r}.")
        rewards.append(float(extract_choice(completion_text(completion), letters, options) == right))
    return rewards


def letters_of(options: Sequence[str]) -> str:
    """As many letters as there are options: `ABC` for three."""
    if not 1 <= len(options) <= len(string.ascii_uppercase):
        raise ValueError(f"A question must have 1 to {len(string.ascii_uppercase)} options, got {len(options)}.")
    return string.ascii_uppercase[: len(options)]


def plain_text(text: str) -> str:
    """Text for comparison: lower case, without formatting, outer punctuation and redundant spaces."""
    return comparable(text).casefold()


def _in_box(box: str, letters: Sequence[str], options: Mapping[str, str]) -> str | None:
    text = unformatted(box)
    return (
        _letter_alone(text, letters)
        or option_with_text(text, options)
        or _labelled(text, letters, options)
        or announcement(text, letters).letter
        or option_with_number(box, options)
    )


def _is_formula(box: str) -> bool:
    text = unformatted(box)
    return bool(_FORMULA.search(text)) and not _WORD.search(text)


def _in_words(text: str, letters: Sequence[str], options: Mapping[str, str]) -> str | None:
    if len(text) > 2 * _MAX_CHARACTERS:
        text = f"{text[:_MAX_CHARACTERS]}\n\n{text[-_MAX_CHARACTERS:]}"
    text = unformatted(_TAG.sub("\n", text))
    announced = announcement(text, letters)
    if announced.is_settled:
        return announced.letter
    lines = text.splitlines()
    for read in (_letter_alone, partial(_labelled, options=options)):
        found = [(number, letter) for number, line in enumerate(lines) if (letter := read(line.strip(), letters))]
        if found:
            rest = "\n".join(lines[found[-1][0] + 1 :])
            is_sure = len({letter for _, letter in found}) == 1 and not has_correction(rest, 0, len(rest))
            return found[0][1] if is_sure else None
    return stated_option(lines[-1], options) if lines else None


def _letter_alone(text: str, letters: Sequence[str]) -> str | None:
    match = _LETTER_ALONE.fullmatch(text)
    return match[1].upper() if match and match[1].upper() in letters else None


def _labelled(text: str, letters: Sequence[str], options: Mapping[str, str]) -> str | None:
    """The label in front of a text, unless that is the text of another option, or none."""
    label = _LABEL.match(text)
    if not label or label[1] not in letters:
        return None
    letter, rest = label[1], text[label.end() :]
    if _NOT_ANOTHER.match(rest):
        return letter
    option = option_with_text(rest, options)
    if option is not None:
        return letter if comparable(options[option]) == comparable(options[letter]) else None
    others = {name for match in _OTHER_LABEL.finditer(rest) for name in match.groups() if name}
    return None if _NO_TEXT.match(rest) or is_condemned(rest) or others & set(letters) - {letter} else letter
