"""Draws `docs/images/step.png`, the stages of a rollout and of an optimizer step: `python docs/draw_step.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch


IMAGES = Path(__file__).parent / "images"
TRL, OURS, YOURS = ("#dbeafe", "#1d4ed8"), ("#ffedd5", "#c2410c"), ("#dcfce7", "#15803d")
WIDTH, HEIGHT, GAP = 3.4, 0.52, 0.46

# Each stage: its owner, the parts that a user can replace, and the tensors that it hands on.
ROLLOUT = [
    ("1  generate", TRL, (), "completion_ids (B, T)"),
    ("2  forwards: old policy, reference", TRL, (), "logps, entropies (B, T)"),
    ("3  rewards", TRL, ("reward_funcs",), "rewards (B)"),
    ("4  cut into segments", OURS, ("segmenter",), "segment_ids (B, T)"),
    ("5  values", OURS, ("estimate_values", "value_model"), "values (B, T)"),
    ("6  advantages", OURS, ("estimate_advantages", "token_weighting"), "advantages, returns (B, T)"),
    ("7  batch: a dictionary of columns", OURS, ("RolloutCallback",), "columns (B, T)"),
    ("8  shuffle, cut into micro-batches", TRL, (), ""),
]
STEP = [
    ("9  policy loss, backward", OURS, ("on_policy_forward",), "the same micro-batch"),
    ("10  critic loss, backward", OURS, (), "after the last micro-batch"),
    ("11  optimizers: critic, then policy (TRL)", OURS, (), "after each optimizer step"),
    ("12  log, checkpoint (through TRL)", OURS, (), ""),
]


def box(axes: Axes, x: float, y: float, width: float, text: str, colours: tuple[str, str]) -> None:
    """A box with a text; `x` is its left side, `y` its middle."""
    style = "round,pad=0,rounding_size=0.09"
    fill, edge = colours
    axes.add_patch(FancyBboxPatch((x, y - HEIGHT / 2), width, HEIGHT, boxstyle=style, fc=fill, ec=edge, lw=1.2))
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=10, color="#111111")


def column(axes: Axes, x: float, title: str, stages: list[tuple]) -> None:
    """Stages from top to bottom, with the replaceable parts on the right."""
    axes.text(x, 0.75, title, fontsize=12, weight="bold")
    for place, (text, owner, parts, handed_on) in enumerate(stages):
        y = -place * (HEIGHT + GAP)
        box(axes, x, y, WIDTH, text, owner)
        for number, part in enumerate(parts):
            shift = 0.31 * (number - (len(parts) - 1) / 2)
            axes.annotate(
                part,
                (x + WIDTH, y),
                (x + WIDTH + 0.35, y - shift),
                va="center",
                fontsize=9,
                family="monospace",
                color=YOURS[1],
                arrowprops={"arrowstyle": "->", "color": YOURS[1], "lw": 0.9},
                bbox={"boxstyle": "round,pad=0.15", "fc": YOURS[0], "ec": "none"},
            )
        if place + 1 < len(stages):
            start, end = y - HEIGHT / 2, y - HEIGHT / 2 - GAP
            axes.annotate("", (x + 0.4, end), (x + 0.4, start), arrowprops={"arrowstyle": "->", "color": "#444444"})
            axes.text(x + 0.55, (start + end) / 2, handed_on, va="center", fontsize=8.5, color="#444444")


def repeat(axes: Axes, x: float, first: int, last: int, shift: float, text: str, up: float) -> None:
    """A bracket on the left that leads from one stage back to an earlier one, a little above its middle."""
    top, bottom = -first * (HEIGHT + GAP) + up, -last * (HEIGHT + GAP)
    axes.plot([x, x - shift, x - shift], [bottom, bottom, top], color="#444444", lw=0.9)
    axes.annotate("", (x, top), (x - shift, top), arrowprops={"arrowstyle": "->", "color": "#444444"})
    axes.text(x - shift - 0.07, (top + bottom) / 2, text, rotation=90, ha="right", va="center", fontsize=8.5)


def main() -> None:
    """Draw the picture."""
    figure, axes = plt.subplots(figsize=(11.5, 7.0), layout="constrained")
    column(axes, 0.0, "Once a rollout", ROLLOUT)
    second = 7.2
    column(axes, second, "Every optimizer step", STEP)
    repeat(axes, second, 0, 1, 0.3, "micro-batch", -0.1)
    repeat(axes, second, 0, 3, 0.75, "next optimizer step", 0.14)
    legend = -5.6 * (HEIGHT + GAP)
    for number, (text, colours) in enumerate((("TRL", TRL), ("this package", OURS), ("yours to replace", YOURS))):
        box(axes, second + 1.75 * number, legend, 1.6, text, colours)
    axes.set(xlim=(-0.2, second + 5.6), ylim=(-7.4 * (HEIGHT + GAP), 1.1), aspect="equal")
    axes.axis("off")
    figure.savefig(IMAGES / "step.png", dpi=130)


if __name__ == "__main__":
    main()
