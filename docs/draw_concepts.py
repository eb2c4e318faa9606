"""
Draws the pictures of `docs/concepts.md`: `python docs/draw_concepts.py`.

The text and its numbers are made up; partition, advantages and ratios are computed by the package.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

from sapo_trl.advantages import segment_gae  # noqa: E402
from sapo_trl.losses import segment_log_ratio  # noqa: E402
from sapo_trl.segmentation import entropy_segments  # noqa: E402
from sapo_trl.segments import Segments  # noqa: E402


FOLDER = Path(__file__).parent / "images"
TOKENS = ["The", "legs", "are", "3", "and", "4", ".", "So", "AB", "is", "3", "+", "4", "=", "7", "."]
ENTROPY = [0.3, 1.1, 0.1, 0.7, 0.1, 0.6, 0.2, 1.4, 0.3, 0.2, 0.8, 1.9, 0.1, 0.1, 0.2, 0.1]
VALUES = [0.55, 0.57, 0.58, 0.60, 0.60, 0.62, 0.63, 0.63, 0.58, 0.59, 0.58, 0.56, 0.15, 0.12, 0.10, 0.08]
LOG_RATIO = [0.02, 0.10, 0.0, 0.05, 0.0, 0.04, 0.01, 0.12, -0.02, 0.0, -0.08, -0.35, 0.0, 0.01, 0.02, 0.0]
REWARD = 0.0
GREYS = ("#ffffff", "#d0d0d0")


def segments_of_the_example() -> Segments:
    """The 30 % of tokens with the highest entropy end a segment."""
    return entropy_segments(torch.tensor([ENTROPY]), torch.ones(1, len(TOKENS), dtype=torch.bool), top_percent=30.0)


def write_tokens(ax: plt.Axes, ids: list[int], labels: list[str] = TOKENS) -> None:
    """The tokens as boxes of equal width, tokens of a segment in the same grey, a thick line around each segment."""
    for position, (text, segment) in enumerate(zip(labels, ids, strict=True)):
        ax.add_patch(plt.Rectangle((position, 0), 1, 1, facecolor=GREYS[segment % 2], edgecolor="#999999", lw=0.5))
        ax.text(position + 0.5, 0.5, text, ha="center", va="center", fontsize=10, family="DejaVu Sans Mono")
    for segment in set(ids):
        first, length = ids.index(segment), ids.count(segment)
        ax.add_patch(plt.Rectangle((first, 0), length, 1, fill=False, edgecolor="black", lw=2))
    ax.set(xlim=(-0.15, len(ids) + 0.15), ylim=(-0.05, 1.05))
    ax.axis("off")


def draw_units(path: Path) -> None:
    """Entropies, and the same response as tokens, segments and one sequence."""
    ids = segments_of_the_example().ids[0].tolist()
    figure, axes = plt.subplots(4, 1, figsize=(10, 4.6), height_ratios=[2.6, 1, 1, 1], layout="constrained")
    cuts = segments_of_the_example().is_last[0].tolist()
    colours = ["black" if cut and position < len(cuts) - 1 else "#bbbbbb" for position, cut in enumerate(cuts)]
    axes[0].bar([position + 0.5 for position in range(len(ENTROPY))], ENTROPY, color=colours, width=0.7)
    axes[0].set(xlim=(-0.15, len(ENTROPY) + 0.15), xticks=[], ylabel="entropy")
    axes[0].set_title("Black: the 30 % of tokens where the policy was least sure. Each ends a segment.", fontsize=10)
    axes[0].spines[["top", "right"]].set_visible(False)
    for ax, name, partition in (
        (axes[1], f"tokens: {len(TOKENS)} units (PPO)", list(range(len(TOKENS)))),
        (axes[2], f"segments: {max(ids) + 1} units (SAPO)", ids),
        (axes[3], "sequence: 1 unit (GRPO's advantage, GSPO's ratio)", [0] * len(TOKENS)),
    ):
        write_tokens(ax, partition)
        ax.set_title(name, loc="left", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_credit(path: Path) -> None:
    """The critic's values at the segments' starts, and the advantages that follow."""
    segments = segments_of_the_example()
    values, rewards = torch.tensor([VALUES]), torch.zeros(1, len(TOKENS))
    rewards[0, -1] = REWARD
    advantages, _ = segment_gae(rewards, values, segments, gamma=1.0, lam=0.0)
    ids = segments.ids[0].tolist()
    figure, axes = plt.subplots(3, 1, figsize=(10, 5.4), height_ratios=[2.4, 1, 2.4], layout="constrained")
    middle = [position + 0.5 for position in range(len(TOKENS))]
    starts = [position for position, first in enumerate(segments.is_first[0].tolist()) if first]
    axes[0].plot(range(len(TOKENS)), VALUES, color="#999999", lw=1, ls="--", label="value before each token")
    axes[0].plot(starts, [VALUES[start] for start in starts], "ko", label="before each segment: these count")
    axes[0].plot([len(TOKENS)], [REWARD], "k*", ms=12, label="reward", clip_on=False)
    axes[0].set(ylabel="value", ylim=(-0.05, 0.9))
    axes[0].legend(frameon=False, fontsize=9, ncols=3, loc="upper center")
    write_tokens(axes[1], ids)
    axes[2].bar(middle, advantages[0].tolist(), width=1, color=[GREYS[segment % 2] for segment in ids], edgecolor="k")
    axes[2].axhline(0, color="black", lw=0.8)
    axes[2].set(ylabel="advantage")
    for ax in (axes[0], axes[2]):
        ax.set(xlim=(-0.15, len(TOKENS) + 0.15), xticks=[])
        ax.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_ratios(path: Path) -> None:
    """Importance ratios of the same update per token, segment and sequence, with the clip range."""
    log_ratio, segments = torch.tensor([LOG_RATIO]), segments_of_the_example()
    old, whole = torch.zeros_like(log_ratio), Segments(torch.zeros_like(segments.ids))
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), sharey=True, layout="constrained")
    for ax, name, ratios in (
        (axes[0], "token", log_ratio.exp()),
        (axes[1], "segment", segment_log_ratio(log_ratio, old, segments).exp()),
        (axes[2], "sequence", segment_log_ratio(log_ratio, old, whole).exp()),
    ):
        ax.stairs(ratios[0].tolist(), color="black", lw=2, baseline=None)
        ax.axhspan(0.8, 1.28, color="#e4e4e4", lw=0, zorder=0)
        ax.axhline(1, color="#777777", lw=0.8, ls=":")
        ax.set(title=f"ratio per {name}", xlabel="token", ylim=(0.65, 1.4))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("new / old probability")
    axes[0].text(0.3, 1.3, "grey: not clipped", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    draw_units(FOLDER / "concept_units.png")
    draw_credit(FOLDER / "concept_credit.png")
    draw_ratios(FOLDER / "concept_ratios.png")


if __name__ == "__main__":
    main()
