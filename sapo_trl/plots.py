"""The demo's two pictures, and the common style of this package's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


if TYPE_CHECKING:
    from .embedded import Evaluation


SEGMENT_COLOURS = ("#a6cee3", "#fdbf6f", "#b2df8a", "#fb9a99", "#cab2d6", "#ffff99")
"""Light enough for black text on them; neighbouring segments never share one."""


# Okabe and Ito's palette, which the colour-blind can tell apart, darkest first.
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")


def curve_styles(count: int) -> list[dict[str, str]]:
    """Styles for some curves: marker, line or colour alone tell neighbours apart, markers alone eleven curves."""
    kinds = (_COLOURS, _LINES, _MARKERS)
    return [
        dict(zip(("color", "linestyle", "marker"), (kind[i % len(kind)] for kind in kinds), strict=True))
        for i in range(count)
    ]


def plot_learning_curve(
    path: Path, accuracies: list[float], responses_per_rollout: int, before: Evaluation, after: Evaluation
) -> None:
    """
    Plot the accuracy of every rollout against the responses seen, between the accuracies measured on test problems.

    Args:
        path (`Path`):
            PNG to write.
        accuracies (`list[float]`):
            Accuracy of each training rollout, in order.
        responses_per_rollout (`int`):
            Size of a rollout.
        before ([`~sapo_trl.embedded.Evaluation`]):
            Accuracy on test problems, before training.
        after ([`~sapo_trl.embedded.Evaluation`]):
            Accuracy on other test problems, after training.
    """
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    # A rollout's accuracy belongs to the policy before it has learned from the rollout.
    seen = [i * responses_per_rollout for i in range(len(accuracies))]
    axes.plot(seen, accuracies, "o-", color="#1f77b4", markersize=4, linewidth=1, label="training rollouts")
    ends = (("before", 0, before), ("after", len(accuracies) * responses_per_rollout, after))
    for i, (name, x, evaluation) in enumerate(ends):
        low, high = evaluation.interval
        error = [[evaluation.accuracy - low], [high - evaluation.accuracy]]
        label = "test problems, 95 % interval" if i == 0 else None
        axes.errorbar(x, evaluation.accuracy, error, fmt="s", color="#d62728", capsize=5, zorder=3, label=label)
        axes.annotate(
            f"{name}: {evaluation.accuracy:.0%}",
            (x, evaluation.accuracy),
            xytext=(10, -14) if i == 0 else (-10, -16),
            textcoords="offset points",
            ha="left" if i == 0 else "right",
            color="#d62728",
        )
    axes.set(xlabel="responses seen", ylabel="accuracy (sampled)", ylim=(0, 1))
    axes.set_title("SAPO on chains of gates in pictures")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path)


def plot_response(path: Path, response: dict[str, Any], problem: dict[str, Any]) -> None:
    """
    Draw one response: its problem, and token by token its segments, the policy's entropy and the critic's value, with
    the Monte-Carlo values of the states in which segments start.

    Args:
        path (`Path`):
            PNG to write.
        response (`dict`):
            A record of [`~sapo_trl.recordings.segmented_responses`], with the lists `monte_carlo_values` and
            `standard_errors` (`None` for a token without them).
        problem (`dict`):
            The problem it answers: `images`, `problem` and `answer`.
    """
    tokens, segment_ids = response["tokens"], response["segment_ids"]
    figure = new_figure(14, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1, 5))
    left.imshow(problem["images"][0], interpolation="nearest")
    left.set_axis_off()
    question = problem["problem"].removeprefix("<image>").replace("\n", ", ")
    verdict = "right" if response["reward"] else "wrong"
    left.set_title(f"{question}\nanswer {problem['answer']}, response {verdict}", fontsize=11)

    positions = range(len(tokens))
    for position, segment in zip(positions, segment_ids, strict=True):
        colour = SEGMENT_COLOURS[segment % len(SEGMENT_COLOURS)]
        right.axvspan(position - 0.5, position + 0.5, color=colour, alpha=0.55, linewidth=0)
        if position and segment != segment_ids[position - 1]:
            right.axvline(position - 0.5, color="black", linewidth=0.8)
    right.bar(positions, response["entropies"], width=0.5, color="#333333", label="entropy of the policy (nats)")
    right.step(
        positions,
        response["values"],
        where="mid",
        color="#d62728",
        linewidth=1.5,
        label="critic's value before the token",
    )
    valued = [place for place, value in enumerate(response["monte_carlo_values"]) if value is not None]
    right.errorbar(
        valued,
        [response["monte_carlo_values"][place] for place in valued],
        [response["standard_errors"][place] for place in valued],
        fmt="o",
        color="#0b559f",
        markersize=5,
        capsize=2,
        label="Monte-Carlo value ± standard error",
    )
    right.set_xticks(positions, [_visible(token) for token in tokens], family="monospace", fontsize=10)
    for label in right.get_xticklabels():
        label.set_rotation(90 if len(label.get_text()) > 2 else 0)
    right.tick_params(axis="x", length=0)
    right.set_xlim(-0.5, len(tokens) - 0.5)
    right.set_ylim(min(0, right.get_ylim()[0]), 1.25 * right.get_ylim()[1])  # room for the legend
    right.set_title(f"{len(set(segment_ids))} segments, cut at the tokens of highest entropy", fontsize=11)
    right.legend(loc="upper right", ncols=3, fontsize=9)
    figure.savefig(path)


def new_figure(width: float, height: float) -> Figure:
    """A figure without a window, of this size in inches."""
    # Not pyplot: that would choose a backend for the whole process and keep the figure alive.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _visible(token: str) -> str:
    """A token as an axis label: signs for unprintable characters, `$` escaped for matplotlib, a short end token."""
    if token == "<|im_end|>":
        return "end"
    signs = (character if character.isprintable() else "·" for character in token.replace("\n", "↵"))
    return "".join(signs).replace("$", r"\$")
