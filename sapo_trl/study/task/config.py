"""The dials of the study's task family."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .vocabulary import FILLER_WORDS, LABELS, SIGNS


@dataclass(frozen=True)
class TaskConfig:
    """
    One task of the family: length of its chains, difficulty of its decisions, and remarks on them in its text.

    Args:
        gates (`int`, *optional*, defaults to `6`):
            Length of the chain: gates of a problem, each with one decision. One wrong decision is a wrong answer.
        signs (`int`, *optional*, defaults to `48`):
            Number of different signs. Each means a cell, and each must be learned on its own.
        known (`float`, *optional*, defaults to `0.6`):
            Share of signs whose right cell the warm-started policy believes in; for the others it believes in a decoy.
        confidence (`float`, *optional*, defaults to `0.75`):
            Probability that the policy follows its belief. Otherwise it chooses the decoy for a known sign, and the
            right cell for an unknown sign.
        filler (`int`, *optional*, defaults to `1`):
            Free words in each step: they change nothing, and the policy draws them evenly.
        filler_choices (`int`, *optional*, defaults to `6`):
            Number of words that each free word is drawn from.
        preamble (`int`, *optional*, defaults to `0`):
            Free words in a line before the first step.
        misread (`float`, *optional*, defaults to `0.0`):
            Share of the pairs of a cell and a number that the warm-started policy reads as another number. There are
            36 pairs.
        reading (`float`, *optional*, defaults to `0.75`):
            Probability that the policy reads such a pair as it believes. Otherwise it reads the right number.
        reveal_delay (`int`, *optional*, defaults to `0`):
            Steps after which the text says truthfully whether a decision was right. `0`: in the step itself, right
            after the decision. `None`: the text never says it.
        pictures (`bool`, *optional*, defaults to `True`):
            Whether the numbers are in a picture. If not, they are in the prompt's text, and the model is a text model.
        world (`int`, *optional*, defaults to `0`):
            Seed of the signs' meanings, of the choice of known signs, and of the numbers that are read wrong.
    """

    gates: int = 6
    signs: int = 48
    known: float = 0.6
    confidence: float = 0.75
    filler: int = 1
    filler_choices: int = 6
    preamble: int = 0
    misread: float = 0.0
    reading: float = 0.75
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
        self._check_share("misread", 0.0)
        self._check_share("reading", 0.5)
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
