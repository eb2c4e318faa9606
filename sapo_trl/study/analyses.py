"""The report's analyses of recordings: the papers' figures, over all recorded runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..analysis import border_agreement, lift_curve, token_jumps, valued_state_jumps
from ..analysis.borders import cuts_of
from ..analysis.figures import plot_gradient_noise, plot_lift
from ..analysis.lift import SHARES
from ..names import markdown_table
from ..statistics import Interval
from .config import StudyConfig
from .figures import MOST_CURVES, groups_of, plot_curves, training_curves
from .recordings import Recordings, by_run
from .results import StudyResults
from .statistics import blocked_contrast
from .task.oracle_cuts import border_characters, tokens_at


LIFT_SHARE = 0.3


def write_analyses(
    study: StudyConfig, results: StudyResults, recordings: Recordings, figures_dir: Path, link: str
) -> list[str]:
    """
    Write the sections on critics, entropy, Lift, cuts and ratios.

    Args:
        study ([`StudyConfig`]): the study.
        results ([`StudyResults`]): its finished runs.
        recordings ([`Recordings`]): the recordings of all of them.
        figures_dir (`Path`): folder for the figures and their data.
        link (`str`): path of this folder in the report's links.

    Returns:
        `list[str]`: Markdown sections; a section without recordings is left out.
    """
    sections = [
        *_curves(study, results, figures_dir, link),
        _lift(recordings, figures_dir, link),
        _borders(recordings),
        _ratios(recordings),
        _gradients(results, figures_dir, link),
    ]
    return [section for section in sections if section]


def _curves(study: StudyConfig, results: StudyResults, figures_dir: Path, link: str) -> list[str]:
    titles = {
        "critic": "Do critics learn?\n\nMedians over runs. Explained variances of returns can be compared between "
        "algorithms only with equal targets; Monte-Carlo values are the same for all, and were measured in recorded "
        "runs",
        "entropy": "Does entropy fall, and do responses get longer?\n\nMedians over runs. In this task all right "
        "responses have the same length",
    }
    columns = {
        "critic": {
            "critic/explained_variance": "explained variance of returns",
            "critic/diagnostics/explained_variance": "explained variance of Monte-Carlo values",
        },
        "entropy": {"entropy": "entropy (nats)", "completions/mean_length": "response length (tokens)"},
    }
    main = next((e for e in study.experiments.values() if e.measure == "accuracy" and study.baseline in e.arms), None)
    if main is None:
        return []
    runs = results.runs_of(main, main.tasks[0])
    sections = []
    for name, wanted in columns.items():
        curves = training_curves(runs, wanted) if not runs.empty else pd.DataFrame(columns=[*wanted.values()])
        curves = curves.drop(columns=[c for c in wanted.values() if curves[c].isna().all()])
        logged = [c for c in wanted.values() if c in curves]
        if not logged:
            continue
        arms = [arm for arm in main.arms if curves.loc[curves["arm"] == arm, logged].notna().any(axis=None)]
        path = figures_dir / f"{name}.png"
        curves = curves[curves["arm"].isin(arms)]
        plot_curves(path, curves, "completions", "responses trained on", groups_of(arms, study.baseline))
        sections.append(f"## {titles[name]}.\n\n![{name}]({link}/{name}.png)\n")
    return sections


def _lift(recordings: Recordings, figures_dir: Path, link: str) -> str:
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    values = dict(by_run(recordings.values))
    # Sampled values of `critic="monte_carlo"` are recorded as values, too.
    with_critic = set(recordings.logs.dropna(subset=["critic/explained_variance"])["arm"])
    for key, responses in by_run(recordings.responses):
        if key[0] not in with_critic:
            continue
        pieces: dict[str, Callable[[], pd.DataFrame]] = {"critic's values": lambda r=responses: token_jumps(r)}
        if key in values:
            pieces["Monte-Carlo values"] = lambda r=responses, k=key: valued_state_jumps(r, values[k])
        for kind, jumps in pieces.items():
            try:
                curve = lift_curve(jumps(), num_resamples=1)  # its band is of one run and is not used
            except ValueError:  # no value differs from another
                continue
            if np.isfinite(curve.lift).all():  # else nothing jumps
                found.setdefault((key[0], kind), []).append(curve.lift)
    if not found:
        return ""
    shares = np.asarray(SHARES)
    rows, points = [], []
    at = int(abs(shares - LIFT_SHARE).argmin())
    for (arm, kind), curves in found.items():
        of_runs = np.stack(curves)
        rows.append(
            {"arm": f"`{arm}`", "values": kind, **over_runs(f"Lift({LIFT_SHARE:g})", of_runs[:, at], 2, (0, np.inf))}
        )
        if kind == "critic's values":
            points.append(pd.DataFrame({"curve": arm, "share": shares, "lift": np.median(of_runs, axis=0)}))
    drawn = pd.concat(points[:MOST_CURVES], ignore_index=True)
    # The medians are drawn without bands.
    plot_lift(figures_dir / "lift.png", drawn.assign(low=drawn["lift"], high=drawn["lift"]), "Median over runs")
    return (
        "## Do values jump where entropy is high?\n\nThe paper's Fig. 3; the definitions are in docs/analysis.md. A "
        "Lift of 1 means no relation. Monte-Carlo values are known only at the borders of segments, and their noise "
        "pulls the Lift towards 1. Brackets are Student's 95 % intervals over runs.\n\n"
        f"{markdown_table(pd.DataFrame(rows))}\n\n![Lift]({link}/lift.png)\n"
    )


def _borders(recordings: Recordings) -> str:
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    kinds = {"steps": "ends of steps", "decisions": "decisions"}
    for key, responses in by_run(recordings.responses):
        cuts = [cuts_of(ids) for ids in responses["segment_ids"]]
        lengths = [len(ids) for ids in responses["segment_ids"]]
        if not any(cuts):  # one segment per response
            continue
        for kind, what in kinds.items():
            true = [tokens_at(border_characters("".join(t), kind), list(t)) for t in responses["tokens"]]
            table = border_agreement(cuts, true, lengths, num_resamples=1).table().set_index("measure")
            row = [table.loc[name, column] for name in ("precision", "recall") for column in ("value", "chance")]
            found.setdefault((key[0], what), []).append(tuple(row))
    if not found:
        return ""
    rows = []
    for (arm, what), of_runs in found.items():
        precision, by_chance, recall, recall_by_chance = np.array(of_runs).T
        rows.append(
            {
                "arm": f"`{arm}`",
                "places": what,
                **over_runs("cuts on them", precision, 3, (0, 1)),
                "by chance": f"{by_chance.mean():.3f}",
                **over_runs("of them cut", recall, 3, (0, 1), count=False),
                "of them by chance": f"{recall_by_chance.mean():.3f}",
            }
        )
    return (
        "## Do cuts fall on true borders?\n\nShares of the cuts that come directly after such a place, and of the "
        "places with such a cut. Chance is the same number of cuts at random places. Means over runs, with Student's "
        f"95 % intervals.\n\n{markdown_table(pd.DataFrame(rows))}\n"
    )


def _ratios(recordings: Recordings) -> str:
    names = {"bias": "ratio/geometric_bias", "bound": "ratio/geometric_bias_bound"}
    logs = recordings.logs.dropna(subset=list(names.values()))
    found: dict[str, list[tuple[float, float, float]]] = {}
    for key, log in by_run(logs):
        bias, bound = (log[name].to_numpy(dtype=float) for name in names.values())
        if (bound > 0).any():
            share = (bias[bound > 0] / bound[bound > 0]).mean()
            found.setdefault(key[0], []).append((bias.mean(), bias.max(), share))
    if not found:
        return ""
    rows = []
    for arm, of_runs in found.items():
        mean, largest, share = np.array(of_runs).T
        rows.append(
            {
                "arm": f"`{arm}`",
                "runs": len(mean),
                "mean bias (median run)": f"{np.median(mean):.2g}",
                "largest bias (any run)": f"{largest.max():.2g}",
                "share of the bound (median run)": f"{np.median(share):.2f}",
            }
        )
    return (
        "## How far is a segment's geometric-mean ratio from its tokens' mean ratio?\n\nThe paper's App. D, over all "
        f"runs with a ratio per segment.\n\n{markdown_table(pd.DataFrame(rows))}\n"
    )


def over_runs(
    name: str, scores: Sequence[float], digits: int, limits: tuple[float, float], count: bool = True
) -> dict[str, str | int]:
    """A mean over runs with Student's interval, cut at the limits of the measure, as cells of a table."""
    scores = np.asarray(scores, dtype=float)
    if len(scores) < 2:
        interval = Interval(float(scores.mean()), np.nan, np.nan)
    else:
        interval = blocked_contrast([(1.0, {0: scores})]).interval
    text = f"{interval.value:.{digits}f}"
    if not np.isnan(interval.low):
        low, high = np.clip([interval.low, interval.high], *limits)
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return {**({"runs": len(scores)} if count else {}), name: text}


def _gradients(results: StudyResults, figures_dir: Path, link: str) -> str:
    runs = results.runs[results.runs["measure"] == "gradient_variance"]
    if runs.empty:
        return ""
    columns = ["noise_to_signal", "noise_to_signal_error", "trace", "squared_mean", "steps"]
    # The table has one run per arm. Its errors come from this run.
    table = runs.sort_values(["world", "seed"]).groupby(["task", "arm"], sort=False)[columns].first().reset_index()
    table["setting"] = table["arm"] if table["task"].nunique() == 1 else table["arm"] + ", " + table["task"]
    plot_gradient_noise(figures_dir / "gradient_variance.png", table)
    shown = table[["setting", "trace", "squared_mean", "noise_to_signal", "noise_to_signal_error"]].copy()
    for name in shown.columns[1:]:
        shown[name] = shown[name].map("{:.3g}".format)
    return (
        "## Which granularity has the noisier gradient?\n\nThe paper's App. C, measured at the warm-started policy, "
        "which does not change. In the first half only learned critics are trained; they go on learning during the "
        "measurement. `noise_to_signal` is the trace of the covariance of one optimizer step's gradient, divided by "
        "the squared mean gradient. It does not depend on the loss's scale.\n\n"
        f"{markdown_table(shown)}\n\n![Noise to signal]({link}/gradient_variance.png)\n"
    )
