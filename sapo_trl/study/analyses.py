"""The report's analyses of single runs: the papers' figures, drawn from the runs' recordings."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..analysis import border_agreement, lift_curve, read_responses, read_values, token_jumps, trend_test
from ..analysis.borders import cuts_of
from ..analysis.figures import plot_borders, plot_gradient_noise, plot_lift, plot_ratio_bias
from ..analysis.lift import STAGES, stages, valued_state_jumps
from ..analysis.ratio_bias import logged_bias
from ..names import markdown_table
from .config import Experiment, StudyConfig
from .figures import plot_curves, training_curves
from .results import StudyResults, metrics_of
from .run_cell import RESPONSES_FOLDER, VALUES_FOLDER
from .task.oracle_cuts import border_characters, tokens_at


def write_analyses(study: StudyConfig, results: StudyResults, figures_dir: Path, link: str) -> list[str]:
    """
    Draw the figures of a study's first experiment.

    Args:
        study ([`StudyConfig`]): the study.
        results ([`StudyResults`]): its finished runs.
        figures_dir (`Path`): folder for the figures and their data.
        link (`str`): path of this folder in the report's links.

    Returns:
        `list[str]`: Markdown sections; a section without recordings is left out.
    """
    main = next((e for e in study.experiments.values() if e.measure == "accuracy"), None)
    if main is None:
        return [section for section in [_gradients(results, figures_dir, link)] if section]
    recorded = _first_run(results, main.tasks[0], study.baseline, recorded=True)
    sections = [
        _critics(results, main, figures_dir, link),
        _entropy(results, main, figures_dir, link),
        _ratios(results, main, study.baseline, figures_dir, link),
        _gradients(results, figures_dir, link),
    ]
    if recorded is not None:
        sections += [_lift(recorded, figures_dir, link), _borders(recorded, figures_dir, link)]
    return [section for section in sections if section]


def _critics(results: StudyResults, experiment: Experiment, figures_dir: Path, link: str) -> str:
    columns = {
        "critic/loss": "value loss",
        "critic/explained_variance": "explained variance of returns",
        "critic/diagnostics/explained_variance": "explained variance of Monte-Carlo values",
    }
    drawn = _curves(results, experiment, figures_dir / "critic.png", columns)
    if not drawn:
        return ""
    return (
        "## Are segment critics steadier?\n\nThe paper's Fig. 6. Value losses of different algorithms have different "
        "targets (segments or tokens) and cannot be compared. Explained variances can be compared. The explained "
        "variance of Monte-Carlo values is measured on recorded seeds only. The noise of these values lowers it.\n\n"
        f"![Value loss and explained variance]({link}/critic.png)\n"
    )


def _entropy(results: StudyResults, experiment: Experiment, figures_dir: Path, link: str) -> str:
    columns = {"entropy": "entropy of the policy (nats)", "completions/mean_length": "response length (tokens)"}
    if not _curves(results, experiment, figures_dir / "entropy.png", columns):
        return ""
    return (
        "## Does entropy collapse more slowly, and do responses get longer?\n\nThe paper's Fig. 7. (In this task all "
        f"right responses have the same length.)\n\n![Entropy and response length]({link}/entropy.png)\n"
    )


def _curves(results: StudyResults, experiment: Experiment, path: Path, columns: dict[str, str]) -> bool:
    curves = training_curves(results, experiment.tasks[0], experiment.arms, experiment.seeds, columns)
    curves = curves.drop(columns=[name for name in columns.values() if curves[name].isna().all()])
    logged = [name for name in columns.values() if name in curves]
    arms = [arm for arm in experiment.arms if curves.loc[curves["arm"] == arm, logged].notna().any(axis=None)]
    if arms:
        plot_curves(path, curves, "completions", "responses trained on", arms, experiment.tasks[0])
    return bool(arms)


def _ratios(results: StudyResults, experiment: Experiment, arm: str, figures_dir: Path, link: str) -> str:
    run = _first_run(results, experiment.tasks[0], arm)
    if run is None:
        return ""
    try:
        logged = logged_bias(metrics_of(run))
    except ValueError:  # an algorithm without a ratio per segment
        return ""
    plot_ratio_bias(figures_dir / "ratio_bias.png", logged)
    share = (logged["bias"] / logged["bound"])[logged["bound"] > 0]
    return (
        "## How far is a segment's geometric-mean ratio from its tokens' mean ratio?\n\nThe paper's App. D, for the "
        f"updates of one run of `{arm}`. The bias is {logged['bias'].mean():.2g} on average, and at most "
        f"{logged['bias'].max():.2g} in a logged mean. It reaches {share.mean():.0%} of its bound.\n\n"
        f"![Bias and bound]({link}/ratio_bias.png)\n"
    )


def _gradients(results: StudyResults, figures_dir: Path, link: str) -> str:
    runs = results.runs[results.runs["measure"] == "gradient_variance"]
    if runs.empty:
        return ""
    columns = ["noise_to_signal", "noise_to_signal_error", "trace", "squared_mean", "steps"]
    # The table has one run per arm. Its errors come from this run.
    table = runs.sort_values("seed").groupby(["task", "arm"], sort=False)[columns].first().reset_index()
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


def _lift(run: pd.Series, figures_dir: Path, link: str) -> str:
    folder = Path(run["folder"])
    responses = read_responses(folder / RESPONSES_FOLDER)
    jumps = token_jumps(responses)
    stage = stages(jumps["step"])
    pieces = {"all": jumps, **{name: jumps[stage == name] for name in STAGES if (stage == name).any()}}
    curves = [("critic's values, " + name, piece, "jump") for name, piece in pieces.items()]
    if (folder / VALUES_FOLDER).is_dir():
        pairs = valued_state_jumps(responses, read_values(folder / VALUES_FOLDER))
        curves.append(("Monte-Carlo values", pairs, "jump"))
    points, tests = [], []
    for name, piece, column in curves:
        curve = lift_curve(piece, column)
        trend = trend_test(piece, column)
        points.append(
            pd.DataFrame(
                {"curve": name, "share": curve.shares, "lift": curve.lift, "low": curve.low, "high": curve.high}
            )
        )
        nearest = abs(curve.shares - 0.3).argmin()
        tests.append(
            {
                "values": name,
                "responses": curve.responses,
                "jumps": curve.jumps,
                "Lift(0.3)": f"{curve.lift[nearest]:.2f} [{curve.low[nearest]:.2f}, {curve.high[nearest]:.2f}]",
                "trend p": f"{trend.p_value:.2g}",
            }
        )
    plot_lift(figures_dir / "lift.png", pd.concat(points, ignore_index=True), "Lift of value jumps by entropy")
    return (
        f"## Do values jump where entropy is high?\n\nThe paper's Fig. 3, from a run of `{run['arm']}` (seed "
        f"{run['seed']}). The definitions are in docs/analysis.md. A Lift of 1 means no relation. Monte-Carlo values "
        "are known only at the borders of segments, and their noise pulls the curve towards 1.\n\n"
        f"{markdown_table(pd.DataFrame(tests))}\n\n![Lift]({link}/lift.png)\n"
    )


def _borders(run: pd.Series, figures_dir: Path, link: str) -> str:
    responses = read_responses(Path(run["folder"]) / RESPONSES_FOLDER, columns=("segment_ids", "tokens"))
    lines = []
    for kind, what in (("steps", "a border of the task's steps"), ("decisions", "a decision")):
        agreement = border_agreement(
            [cuts_of(ids) for ids in responses["segment_ids"]],
            [tokens_at(border_characters("".join(tokens), kind), list(tokens)) for tokens in responses["tokens"]],
            [len(ids) for ids in responses["segment_ids"]],
        )
        table = agreement.table()
        plot_borders(figures_dir / f"borders_{kind}.png", table, "borders between steps" if kind == "steps" else kind)
        precision, recall = (table.set_index("measure").loc[name] for name in ("precision", "recall"))
        lines.append(
            f"{precision['value']:.0%} of the cuts come directly after {what} (of as many random cuts: "
            f"{precision['chance']:.0%}). {recall['value']:.0%} of these places have a cut (with random cuts: "
            f"{recall['chance']:.0%}).\n\n![Cuts on {kind}]({link}/borders_{kind}.png)\n"
        )
    return f"## Do the cuts of `{run['arm']}` fall on true borders?\n\n" + "\n".join(lines)


def _first_run(results: StudyResults, task: str, arm: str, recorded: bool = False) -> pd.Series | None:
    runs = results.runs_of(task, [arm])
    if recorded:
        runs = runs[[(Path(folder) / RESPONSES_FOLDER).is_dir() for folder in runs["folder"]]]
    return None if runs.empty else runs.sort_values("seed").iloc[0]
