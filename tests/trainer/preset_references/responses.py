"""Made-up responses, and the places where each algorithm cuts them."""

import math
import random
import re
from dataclasses import dataclass, field


MAX_COMPLETION_LENGTH = 64
NUM_ROWS, ROWS_PER_STEP, ROWS_PER_MICRO_BATCH = 8, 4, 2


@dataclass
class Response:
    """A response, what the models say about it, and what an algorithm makes of it."""

    prompt: list[int]
    ids: list[int]
    texts: list[str]
    kept: list[int]  # positions that the policy wrote; the others are a tool's
    reward: float
    logps: list[float]
    entropies: list[float]
    values: list[float]
    ref_logps: list[float]
    new_logps: list[float]  # of the policy that is being updated
    new_values: list[float]
    # What a reference fills in, by position.
    segments: list[list[int]] = field(default_factory=list)
    advantages: dict[int, float] = field(default_factory=dict)
    targets: dict[int, float] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """Positions that take part: none in a response without a reward."""
        return [] if math.isnan(self.reward) else self.kept

    def segment_of(self, t: int) -> list[int]:
        return next(segment for segment in self.segments if t in segment)


def made_up_responses(
    tokenizer,
    seed: int,
    generations: int = 1,
    holes: bool = False,
    drift: float = 0.15,
    texts: list[str] | None = None,
) -> list[Response]:
    """Eight responses, the responses to a prompt next to each other; `drift` is how far the policy moved."""
    rng = random.Random(seed)
    pieces = ["ab", "cd=3", "\n", "\n\n", ".\n", "Step 1: ", "Step 2.", "Step", " x", "7"]
    kinds = ["one token", "unscored", "confident", "many lines", *["any"] * (NUM_ROWS - 4)]
    rng.shuffle(kinds)
    rewards = [0.0, 0.3] if seed == 2 else [0.0, 0.3, 0.8, 1.0]  # of the third case no response is correct
    rows = []
    for index, kind in enumerate(kinds):
        if texts is not None:
            ids = tokenizer(texts[index])["input_ids"]
        elif kind == "one token":
            ids = tokenizer("a")["input_ids"]
        elif kind == "many lines":
            ids = tokenizer("a\n" * 30)["input_ids"]
        else:
            ids = tokenizer("a" + "".join(rng.choice(pieces) for _ in range(30)))["input_ids"][: rng.randint(2, 40)]
        length = len(ids)
        kept = [t for t in range(length) if not holes or length == 1 or rng.random() < 0.75] or [0]
        probabilities = [
            rng.uniform(0.92, 0.999) if kind == "confident" or rng.random() < 0.4 else rng.uniform(0.02, 0.85)
            for _ in ids
        ]
        logps = [math.log(p) for p in probabilities]
        values = [rng.uniform(-0.5, 1.5) for _ in ids]
        group = index // generations
        rows.append(
            Response(
                prompt=[20 + group, *[100] * group, 40],
                ids=ids,
                texts=[tokenizer.decode([token]) for token in ids],
                kept=kept,
                reward=math.nan if kind == "unscored" else rng.choice(rewards),
                logps=logps,
                entropies=[round(rng.uniform(0, 3), 1) for _ in ids],  # with ties
                values=values,
                ref_logps=[logp + rng.gauss(0, 0.3) for logp in logps],
                new_logps=[logp + rng.gauss(0, drift) + rng.choice([0] * 8 + [-10, 10]) * drift for logp in logps],
                new_values=[value + rng.gauss(0, 0.5) for value in values],
            )
        )
    if seed == 1:
        # An outlier, for what bounds advantages.
        next(row for row, kind in zip(rows, kinds, strict=True) if kind == "one token").reward = 40.0
    return rows


def cut_behind(tokens: list[int], last_tokens: set[int]) -> list[list[int]]:
    """Behind the last tokens, and before tokens that the policy did not write: there ends a turn."""
    segments, current = [], []
    for t in tokens:
        current.append(t)
        if t in last_tokens or t + 1 not in tokens:
            segments.append(current)
            current = []
    return segments


def cut_before(tokens: list[int], first_tokens: set[int]) -> list[list[int]]:
    segments = []
    for t in tokens:
        if t in first_tokens or t - 1 not in tokens:
            segments.append([])
        segments[-1].append(t)
    return segments


def turns_of(row: Response) -> list[list[int]]:
    return cut_behind(row.tokens, set())


def at_entropies(row: Response) -> list[list[int]]:
    """Behind the max(ceil(0.3 n), 1) tokens of highest entropy, the earlier of equals."""
    count = max(-(-3 * len(row.tokens) // 10), 1)
    ranked = sorted(row.tokens, key=lambda t: (-row.entropies[t], t))
    return cut_behind(row.tokens, set(ranked[:count]))


def at_improbable_tokens(row: Response) -> list[list[int]]:
    """Behind the 8 least probable tokens."""
    return cut_behind(row.tokens, set(sorted(row.tokens, key=lambda t: row.logps[t])[:8]))


def at_lines(row: Response) -> list[list[int]]:
    """Behind line breaks. A line has text: blanks go to the next one that has, behind the last text to that."""
    return [line for turn in turns_of(row) for line in lines_of(row, turn)]


def lines_of(row: Response, turn: list[int]) -> list[list[int]]:
    last_tokens = set()
    for t, following in zip(turn, [*turn[1:], None], strict=False):
        if "\n" in row.texts[t] and (following is None or "\n" not in row.texts[following]):
            last_tokens.add(t)
    lines, blank = [], []
    for piece in cut_behind(turn, last_tokens):
        blank += piece
        if any(row.texts[t].strip() and not row.texts[t].startswith("<|") for t in piece):
            lines.append(blank)
            blank = []
    if blank and lines:
        lines[-1] += blank
    elif blank:
        lines.append(blank)
    return lines


def at_steps(row: Response) -> list[list[int]]:
    """Before "Step 1:", "Step 2." and so on."""
    first_tokens = set()
    for turn in turns_of(row):
        token_of_character = [t for t in turn for _ in row.texts[t]]
        text = "".join(row.texts[t] for t in turn)
        first_tokens |= {token_of_character[m.start()] for m in re.finditer(r"Step\s*\d+\s*[:.]", text)}
    return cut_before(row.tokens, first_tokens)


def at_every_token(row: Response) -> list[list[int]]:
    return [[t] for t in row.tokens]


def nowhere(row: Response) -> list[list[int]]:
    return [row.tokens] if row.tokens else []
