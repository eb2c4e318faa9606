r"""
Reward for the right letter of a multiple choice question, and how the letter is read off a response.

A box is what prompts ask for, so it counts alone: text around it is not looked at. Without one, the surest of these
signs decides, and among signs of a kind the last: an announcement ("the answer is B"), a last line that starts with a
marked letter ("B. 12 cm"), a letter in parentheses, the text of an option in the last line. Anything less is no
answer: a letter is never guessed.
"""

import re
import string
from collections.abc import Mapping, Sequence

from .completion import Completion, completion_text, last_boxed
from .numbers import is_close


DEFAULT_LETTERS = string.ascii_uppercase[:10]

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|mbox)\s*\{([^{}]*)\}")
_FORMATTING = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:! ]|[$*`]")
# At most a few marks between the announcement and the letter, and no end of a sentence. No colon after "choice": that
# is how questions list their options.
_ANNOUNCED = re.compile(
    r"(?:(?i:\banswer\b(?:\s+(?:is|was|would\s+be|must\s+be))?)[^\w.,;!?]{0,12}"
    r"|(?i:\b(?:option|choice|choose|chose|select|pick)\b(?:\s+is)?)[\s(\[\"']{1,4})"
    r"(?P<after>[A-Za-z0-9])(?![\w'’])"
    r"|(?<![\w'’-])(?P<before>[A-Z0-9])\)?\s+is\s+(?:the\s+)?(?:correct|right)\b"
)
_MARKED_LINE = re.compile(r"[(\[]?([A-Z0-9])(?:[)\]:]|\.(?!\w))")
_IN_PARENTHESES = re.compile(r"\(([A-Z0-9])\)")
_UNIT_OR_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")
# "The answer is A triangle": a word follows, so this is the article, or "I". After these words it is not.
_WORDS = ("A", "I")
_SENTENCE_GOES_ON = re.compile(r"[ \t]+(?!(?:because|since|as|and|or|with|which|for|by|based|from)\b)\w")


def extract_choice(text: str, letters: Sequence[str], options: Sequence[str] | None = None) -> str | None:
    r"""
    The letter that a response chooses.

    Args:
        text (`str`):
            The response.
        letters (`Sequence[str]`):
            Letters (or digits) that may be chosen, in upper case: `"ABCD"`.
        options (`Sequence[str]`, *optional*):
            What each of the letters stands for. A box or a last line with the text of one option chooses it; so does
            a box with its number, written differently.

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
    if "\\boxed{" in text:
        box = last_boxed(text)
        return None if box is None else _in_box(box, letters, options)
    # Thinking weighs every option; what follows it is the answer.
    answer = _without_formatting(text.rpartition("</think>")[2])
    last_line = answer.rpartition("\n")[2].strip()
    return (
        _announced(answer, letters)
        or _exactly_a_letter(last_line, letters)
        or _marked(last_line, letters)
        or _last_of(_IN_PARENTHESES.findall(answer), letters)
        or _mentioned_option(last_line, letters, options)
    )


def multiple_choice_reward(
    completions: list[Completion], answer: list[str], choices: list[Sequence[str] | None] | None = None, **kwargs
) -> list[float]:
    r"""
    1.0 for each completion that chooses the right letter, else 0.0.

    Args:
        completions (`list`):
            Completions, each a string or a list of messages.
        answer (`list[str]`):
            Right letters: `B`, or `(B)`.
        choices (`list`, *optional*):
            Options of each question, first that of `A`. Without them the letters `A` to `J` may be chosen.
        **kwargs:
            The trainer's other columns, unused.

    Returns:
        `list[float]`: One reward a completion.

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
    rewards = []
    for completion, gold, options in zip(completions, answer, choices, strict=True):
        letters = DEFAULT_LETTERS if options is None else letters_of(options)
        right = _exactly_a_letter(str(gold).strip(), letters)
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
    """Text for comparison: lower case, without formatting, outer punctuation and spaces that change nothing."""
    return " ".join(_without_formatting(text).casefold().split()).strip(" .,:;!?\"'")


def _without_formatting(text: str) -> str:
    for _ in range(2):  # \text{\textbf{B}}
        text = _WRAPPED.sub(r"\1", text)
    return _FORMATTING.sub("", text).strip()


def _in_box(box: str, letters: Sequence[str], options: Sequence[str] | None) -> str | None:
    bare = _without_formatting(box)
    texts = dict(zip(letters, options or (), strict=options is not None))
    return (
        _exactly_a_letter(bare, letters)
        or next((letter for letter, option in texts.items() if plain_text(option) == plain_text(box)), None)
        or _marked(bare, letters)
        or _announced(bare, letters)
        or _same_number(box, texts)
    )


def _same_number(box: str, texts: Mapping[str, str]) -> str | None:
    """The only option with the number in a box, if that has no unit: 5 m is not 5 cm."""
    if _UNIT_OR_WORD.search(box):
        return None
    same = [letter for letter, option in texts.items() if is_close(box, option)]
    return same[0] if len(same) == 1 else None


def _announced(text: str, letters: Sequence[str]) -> str | None:
    found = []
    for match in _ANNOUNCED.finditer(text):
        letter = (match["after"] or match["before"]).upper()
        is_word = match["after"] and letter in _WORDS and _SENTENCE_GOES_ON.match(text, match.end())
        if not is_word:
            found.append(letter)
    return _last_of(found, letters)


def _exactly_a_letter(text: str, letters: Sequence[str]) -> str | None:
    match = re.fullmatch(r"[(\[]?([A-Za-z0-9])[)\]]?[.:]?", text)
    return _last_of([match[1].upper()], letters) if match else None


def _marked(text: str, letters: Sequence[str]) -> str | None:
    match = _MARKED_LINE.match(text)
    return _last_of([match[1]], letters) if match else None


def _last_of(found: Sequence[str], letters: Sequence[str]) -> str | None:
    return next((letter for letter in reversed(found) if letter in letters), None)


def _mentioned_option(text: str, letters: Sequence[str], options: Sequence[str] | None) -> str | None:
    """The option whose text ends last; of two that end together the longer ("red" in "dark red")."""
    line, mentions = plain_text(text), []
    for letter, option in zip(letters, options or (), strict=options is not None):
        wanted = plain_text(option)
        if wanted:
            found = re.finditer(rf"(?<!\w){re.escape(wanted)}(?!\w)", line)
            mentions += [(match.end(), len(wanted), letter) for match in found]
    return max(mentions)[2] if mentions else None
