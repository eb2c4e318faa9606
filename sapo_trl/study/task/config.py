"""The dials of the study's task family."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .vocabulary import FILLER_WORDS, LABELS, SIGNS


@dataclass(frozen=True)
class TaskConfig:
    """
    One task of the family: how long its chains are, how hard its decisions, and what its text reveals of them.

    Args:
        gates (`int`, *optional*, defaults to `6`):
            Length of the chain: gates of a problem, each with one decision. One wrong decision is a wrong answer.
        signs (`int`, *optional*, defaults to `48`):
            Different signs that gates carry. Each means a cell, and each has to be learned on its own.
        known (`float`, *optional*, defaults to `0.6`):
            Share of signs that the warm-started policy takes for what they mean; the others it takes for another cell.
        confidence (`float`, *optional*, defaults to `0.75`):
            Probability with which it does what it takes a sign to mean. For a sign that it knows the other choice is a
            decoy, for one that it does not know the right cell.
        filler (`int`, *optional*, defaults to `1`):
            Free words in each step: they change nothing, and the policy draws them evenly.
        filler_choices (`int`, *optional*, defaults to `6`):
            Words that each of them is drawn from.
        preamble (`int`, *optional*, defaults to `0`):
            Free words in a line before the first step.
        reveal_delay (`int`, *optional*, defaults to `0`):
            Steps after which the text says truthfully whether a decision was right: `0` in the step itself, right
            behind it. `None`: the text never says.
        pictures (`bool`, *optional*, defaults to `True`):
            Whether the numbers are in a picture. If not, they are in the prompt's text, and the model is a text model.
        world (`int`, *optional*, defaults to `0`):
            Seed of what the signs mean and of which of them are known.
    """

    gates: int = 6
    signs: int = 48
    known: float = 0.6
    confidence: float = 0.75
    filler: int = 1
    filler_choices: int = 6
    preamble: int = 0
    reveal_delay: int | None = 0
    pictures: bool = True
    world: int = 0

    def __post_init__(self):
        self._check_whole_number("gates", 1, len(LABELS))
        self._check_whole_number("signs", 2, len(SIGNS))
        self._check_share("known", 0.0)
        self._check_share("confidence", 0.5)
        self._check_whole_number("filler", 0, 8)
        self._check_whole_number("filler_choices", 1, len(FILLER_WORDS))
        self._check_whole_number("preamble", 0, 32)
        if self.reveal_delay is not None:
            self._check_whole_number("reveal_delay", 0, self.gates)
        if not isinstance(self.pictures, bool):
            raise ValueError(f"`pictures` must be True or False, got {self.pictures!r}.")
        self._check_whole_number("world", 0, 2**31 - 1)

    def _check_whole_number(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            kind = next(field.type for field in fields(self) if field.name == name)
            or_none = " or None" if "None" in kind else ""
            raise ValueError(f"`{name}` must be a whole number from {low} to {high}{or_none}, got {value!r}.")

    def _check_share(self, name: str, low: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= 1.0:
            raise ValueError(f"`{name}` must be a number from {low} to 1.0, got {value!r}.")
