"""The analyses of `sapo-trl analyze`: each prints a summary and writes a figure and a table."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from ..recordings.log import read_log_history
from ..recordings.reading import read_responses, read_values
from .borders import border_agreement, borders_of, cuts_of
from .figures import plot_borders, plot_gradient_noise, plot_lift, plot_ratio_bias
from .gradient_variance import read_results
from .lift import STAGES, lift_curve, stages, token_jumps, trend_test, valued_state_jumps
from .ratio_bias import logged_bias


def _bootstrap(arguments: argparse.Namespace) -> dict[str, float | int]:
    return {
        "confidence": arguments.confidence,
        "num_resamples": arguments.resamples,
        "seed": arguments.seed,
    }


def run_lift(arguments: argparse.Namespace, console: Console) -> None:
    """Curves of the critic's values by stage, and of Monte-Carlo values where they are given."""
    responses = read_responses(arguments.run_folder)
    jumps = token_jumps(responses)
    # Read before anything is written: a wrong folder leaves no half of a result.
    pairs = None if arguments.values is None else valued_state_jumps(responses, read_values(arguments.values))
    stage = stages(jumps["step"])
    pieces = {"all": jumps, **{name: jumps[stage == name] for name in STAGES if (stage == name).any()}}
    curves = {name: (piece, "jump") for name, piece in pieces.items()}
    written = _lift_files("lift", "Lift of the critic's values", curves, arguments, console)
    if pairs is not None:
        columns = {"Monte Carlo": "jump", "MC squared": "squared_jump", "critic": "critic_jump"}
        curves = {name: (pairs, column) for name, column in columns.items()}
        written += _lift_files("lift_monte_carlo", "Lift between valued states", curves, arguments, console)
    _print_paths(written, console)


def _lift_files(
    name: str,
    title: str,
    curves: dict[str, tuple[pd.DataFrame, str]],
    arguments: argparse.Namespace,
    console: Console,
) -> list[Path]:
    points, tests = [], []
    table = Table("curve", "responses", "Lift(0.1)", "Lift(0.3)", "trend p", title=title, title_justify="left")
    for label, (jumps, column) in curves.items():
        curve = lift_curve(jumps, column, **_bootstrap(arguments))
        trend = trend_test(jumps, column)
        frame = pd.DataFrame({"share": curve.shares, "lift": curve.lift, "low": curve.low, "high": curve.high})
        points.append(frame.assign(curve=label)[["curve", "share", "lift", "low", "high"]])
        trend_columns = {f"trend_{name}": value for name, value in asdict(trend).items()}
        tests.append({"curve": label, "responses": curve.responses, "jumps": curve.jumps, **trend_columns})
        cells = []
        for share in (0.1, 0.3):
            point = frame.iloc[(frame["share"] - share).abs().argmin()]
            cells.append(f"{point['lift']:.2f} ({point['low']:.2f}–{point['high']:.2f})")
        table.add_row(label, str(curve.responses), *cells, f"{trend.p_value:.2g}")
    console.print(table)
    written = plot_lift(arguments.output / f"{name}.png", pd.concat(points, ignore_index=True), title)
    tests_path = arguments.output / f"{name}_trend.csv"
    pd.DataFrame(tests).to_csv(tests_path, index=False)
    return [*written, tests_path]


def run_ratio_bias(arguments: argparse.Namespace, console: Console) -> None:
    """The logged bias and bound over training."""
    log = read_log_history(arguments.run_folder)
    try:
        logged = logged_bias(log)
    except ValueError as error:
        raise ValueError(f"{arguments.run_folder}: {error}") from error
    if logged.empty:
        raise ValueError(f"{arguments.run_folder}: no entry of the log has both the bias and its bound.")
    table = Table("Segment ratios", "mean", "largest", "last")
    for column, label in (("bias", "arithmetic − geometric mean"), ("bound", "bound"), ("ratio_mean", "mean ratio")):
        if column in logged:
            values = logged[column]
            table.add_row(label, *(f"{number:.3g}" for number in (values.mean(), values.max(), values.iloc[-1])))
    console.print(table)
    _print_paths(plot_ratio_bias(arguments.output / "ratio_bias.png", logged), console)


def run_borders(arguments: argparse.Namespace, console: Console) -> None:
    """Cuts of the recorded responses beside borders from a file, or from their text."""
    if arguments.borders is None:
        try:
            re.compile(arguments.pattern)
        except re.error as error:
            raise ValueError(f"`--pattern` is not a regular expression: {arguments.pattern!r} ({error})") from error
        responses = read_responses(arguments.run_folder, columns=("segment_ids", "tokens"))
        true_borders = [borders_of(tokens, arguments.pattern) for tokens in responses["tokens"]]
    else:
        responses = read_responses(arguments.run_folder, columns=("segment_ids",))
        true_borders = read_borders(arguments.borders, responses)
    agreement = border_agreement(
        [cuts_of(ids) for ids in responses["segment_ids"]],
        true_borders,
        [len(ids) for ids in responses["segment_ids"]],
        **_bootstrap(arguments),
    )
    numbers = agreement.table()
    table = Table("Cuts on borders", "value", "interval", "by chance")
    for row in numbers.itertuples():
        table.add_row(row.measure, f"{row.value:.3f}", f"{row.low:.3f} – {row.high:.3f}", f"{row.chance:.3f}")
    console.print(table)
    console.print(
        f"{agreement.hits} of {agreement.cuts} cuts are on one of {agreement.borders} borders; by chance "
        f"{agreement.expected_hits:.1f} (p = {agreement.p_value:.3g}), {agreement.responses} responses"
    )
    _print_paths(plot_borders(arguments.output / "borders.png", numbers), console)


def read_borders(path: Path, responses: pd.DataFrame) -> list[list[int]]:
    """
    Read true borders from a file.

    Args:
        path (`Path`): one JSON object a line: `step`, `process`, `response`, `borders`.
        responses (`pd.DataFrame`): from [`~sapo_trl.analysis.read_responses`]; the file must have all of them.

    Returns:
        `list[list[int]]`: the borders of each response.

    Raises:
        ValueError: if the file has another form, or lacks a response.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    known = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            entry = json.loads(line)
            known[entry["step"], entry["process"], entry["response"]] = [int(place) for place in entry["borders"]]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not an object with step, process, response, borders.") from error
    keys = list(zip(responses["step"], responses["process"], responses["response"], strict=True))
    for step, process, response in keys:
        if (step, process, response) not in known:
            raise ValueError(f"{path}: no borders of step {step}, process {process}, response {response}.")
    return [known[key] for key in keys]


def run_gradient_variance(arguments: argparse.Namespace, console: Console) -> None:
    """The measured noise of some settings side by side."""
    paths = {}
    for argument in arguments.results:
        name, sign, path = argument.partition("=")
        if not (name and sign and path):
            raise ValueError(f"`results` are given as NAME=FILE, got {argument!r}")
        if name in paths:
            raise ValueError(f"`results` has the name {name!r} twice")
        paths[name] = Path(path)
    results = read_results(paths)
    table = Table("Gradient", "steps", "trace of covariance", "squared mean", "noise to signal")
    for name, noise in results.items():
        table.add_row(
            name,
            str(noise.steps),
            f"{noise.trace:.3g} ± {noise.trace_error:.2g}",
            f"{noise.squared_mean:.3g} ± {noise.squared_mean_error:.2g}",
            f"{noise.noise_to_signal:.3g} ± {noise.noise_to_signal_error:.2g}",
        )
    console.print(table)
    rows = pd.DataFrame([{"setting": name, **asdict(noise)} for name, noise in results.items()])
    _print_paths(plot_gradient_noise(arguments.output / "gradient_variance.png", rows), console)


def _print_paths(paths: list[Path], console: Console) -> None:
    for path in paths:
        # As it is: no line breaks inside of paths, no markup of brackets.
        console.print(str(path), soft_wrap=True, markup=False, highlight=False)
