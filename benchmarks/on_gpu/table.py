"""The report as tables for `docs/performance.md`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .row_list import SIZES, Row


GIB = 1024**3
MODELS = {
    "3b": "Qwen2.5-VL-3B's shape with random weights in bfloat16",
    "tiny": "a tiny model of Qwen2.5-VL's kind with random weights",
}

Found = list[tuple[Row, dict[str, Any]]]
"""Rows that were started, with the runner's findings."""


def as_markdown(report: dict[str, Any], rows: Sequence[Row]) -> str:
    """
    The machine, a table for each kind of rows, and the rows that are missing.

    Args:
        report (`dict`): see [`~on_gpu.runner.Report`].
        rows (`Sequence[Row]`): the whole list, whether its rows were started or not.
    """
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"{report['machine']}; {versions}. Model: {MODELS[report['size']]}.", ""]
    started = [(row, report["rows"][row.name]) for row in rows if row.name in report["rows"]]
    tables: dict[str, Found] = {}
    for row, found in started:
        tables.setdefault(row.table if row.table in WRITERS else "other", []).append((row, found))
    for name in (*WRITERS, "other"):
        if name in tables:
            lines += [*WRITERS.get(name, other)(tables[name], report), ""]
    lines += [
        f"Stopped after {seconds:.0f} s by the time limit: {name}." for name, seconds in report["cut_off"].items()
    ]
    missing = [row.name for row in rows if row.name not in report["rows"] and row.name not in report["cut_off"]]
    if missing:
        lines.append(f"Not started: {', '.join(missing)}.")
    lines += [f"Warning: {warning}." for warning in report["warnings"]]
    lines.append(f"`make gpu{'' if report['size'] == '3b' else ' ARGS=' + repr('--size ' + report['size'])}`")
    return "\n".join(lines) + "\n"


def table(columns: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """A Markdown table. Columns after the first `left` ones are aligned to the right. Short rows are filled up."""
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    cells = [row + [""] * (len(columns) - len(row)) for row in rows]
    return [f"| {' | '.join(row)} |" for row in (columns, rule, *cells)]


def failed(found: dict[str, Any]) -> str:
    """The error for a cell."""
    return found["error"].replace("|", " ")


def cost(rows: Found, report: dict[str, Any]) -> list[str]:
    """Times, memory and padding of scoring and updating, beside the row to compare with."""
    columns = [
        "trainer",
        "seconds per rollout",
        "min to max",
        "tokens per second",
        "peak GiB",
        "planner GiB",
        "padding",
    ]
    columns += ["compared with", "time", "memory"]
    cells = []
    for row, found in rows:
        if "result" not in found:
            cells.append([row.title, failed(found)])
            continue
        result = found["result"]
        seconds = f"{result['seconds']:.2f}", f"{result['fastest']:.2f} to {result['slowest']:.2f}"
        sizes = (f"{result[name] / GIB:.2f}" for name in ("peak_bytes", "planned_bytes"))
        line = [row.title, *seconds, f"{result['tokens_per_second']:.0f}", *sizes, f"{result['padding']:.1%}"]
        cells.append(line + compared(row, result, report, "seconds"))
    results = [found["result"] for _, found in rows if "result" in found]
    title = rows[0][0].table
    lines = [f"Scoring and updating, {'equal lengths' if title == 'equal' else 'lengths that differ'}:", ""]
    lines += table(columns, cells)
    if results:
        responses, options = results[0]["responses"], SIZES[report["size"]][title]
        lengths = " to ".join(dict.fromkeys(f"{responses[name]:,}" for name in ("shortest", "longest")))
        lines += [
            "",
            f"Rollouts of {responses['number']} responses of {lengths} tokens to prompts of "
            f"{results[0]['prompt_tokens']} tokens with a picture; two optimizer steps each, "
            f"`{results[0]['optimizer']}`; `update_cost.py {options}`, one process a row. The first rollout is not "
            "timed. The peak belongs to tensors on a GPU, and to the process on a CPU.",
        ]
    return lines


def compared(row: Row, result: dict[str, Any], report: dict[str, Any], time: str) -> list[str]:
    """Title of the row to compare with, and the ratios of time and memory to it."""
    other = report["rows"].get(row.against, {})
    if "result" not in other:
        return []
    return [other["title"], *(f"**{result[name] / other['result'][name]:.3f}**" for name in (time, "peak_bytes"))]


def generation(rows: Found, report: dict[str, Any]) -> list[str]:
    """Times and memory of whole steps."""
    columns = ["trainer", "seconds per step", "peak GiB", "planner GiB", "compared with", "time", "memory"]
    cells = []
    for row, found in rows:
        if "result" not in found:
            cells.append([row.title, failed(found)])
            continue
        result = found["result"]
        sizes = (f"{result[name] / GIB:.2f}" for name in ("peak_bytes", "planned_bytes"))
        line = [row.title, f"{result['seconds_per_step']:.2f}", *sizes]
        cells.append(line + compared(row, result, report, "seconds_per_step"))
    options = SIZES[report["size"]]["generation"]
    return [
        "Whole steps, generation with transformers included:",
        "",
        *table(columns, cells),
        "",
        f"One optimizer step for each rollout, `memory_and_speed.py {options}`. TRL's trainer then takes the old "
        "log-probabilities from the update's own forward. SAPO always scores a rollout first.",
    ]


def profile(rows: Found, report: dict[str, Any]) -> list[str]:
    """Shares of the stages, with a column for each trainer."""
    measured = {row.title: found["result"] for row, found in rows if "result" in found}
    stages = list(dict.fromkeys(stage for result in measured.values() for stage in result["stages"]))
    stages.sort(key=lambda stage: stage == "everything else")  # it comes last
    cells = [
        [stage]
        + [
            f"{result['stages'][stage] / result['seconds_per_rollout']:.1%}" if stage in result["stages"] else ""
            for result in measured.values()
        ]
        for stage in stages
    ]
    cells.append(["seconds per rollout", *(f"{result['seconds_per_rollout']:.2f}" for result in measured.values())])
    lines = ["Shares of the stages, lengths that differ:", ""]
    lines += table(["stage", *measured], cells) if measured else []
    lines += [f"- {row.title}: {failed(found)}" for row, found in rows if "error" in found]
    return [*lines, "", f"`profile_step.py {SIZES[report['size']]['spread']}`"]


def lengths(rows: Found, report: dict[str, Any]) -> list[str]:
    """Seconds of the stages by the length of the longest response."""
    lines = []
    for row, found in rows:
        lines += [f"Seconds per rollout by the length of the longest response, {row.title}:", ""]
        if "result" in found:
            result = found["result"]
            cells = [
                [
                    stage,
                    *(f"{value:.3f}" for value in seconds),
                    f"{result['powers'][stage]:.2f}" if result["powers"] else "",
                ]
                for stage, seconds in result["seconds"].items()
            ]
            lines += table(["stage", *map(str, result["lengths"]), "power"], cells)
        lines += [f"- {failed(found)}"] if "error" in found else []
    return [*lines, "", f"`length_scaling.py {SIZES[report['size']]['lengths']}`"]


def tests(rows: Found, report: dict[str, Any]) -> list[str]:
    """One line for each run of tests."""
    lines = []
    for row, found in rows:
        result = found.get("result", {})
        parts = [f"{result[name]} {name}" for name in ("passed", "failed", "skipped") if result.get(name)]
        parts += [found["error"]] if "error" in found else []
        first = f" First failure: {result['first_failure']}." if "first_failure" in result else ""
        lines.append(f"{row.title}: {', '.join(parts)} ({found['took']:.0f} s).{first}")
    return lines


def padding(rows: Found, report: dict[str, Any]) -> list[str]:
    """The medians of the counted shares."""
    lines = []
    for row, found in rows:
        if "result" not in found:
            lines.append(f"{row.title}: {failed(found)}")
            continue
        names = {"TRL": "padding/trl", "this package to train": "padding/train/own", "to score": "padding/score/own"}
        shares = (f"{title} {found['result']['counts'][name]['median']:.1%}" for title, name in names.items())
        lines.append(
            f"{row.title}: {', '.join(shares)} (medians, `{row.arguments(report['size']).split(' --out')[0]}`)."
        )
    return lines


def other(rows: Found, report: dict[str, Any]) -> list[str]:
    """The numbers at the top of each result, of any kind of row."""
    cells = []
    for row, found in rows:
        numbers = [
            f"{name} {value:.4g}" for name, value in found.get("result", {}).items() if isinstance(value, int | float)
        ]
        cells.append([row.title, failed(found) if "error" in found else "; ".join(numbers) or "done"])
    return table(["other rows", "numbers"], cells, left=2)


WRITERS = {
    "tests": tests,
    "equal": cost,
    "spread": cost,
    "generation": generation,
    "profile": profile,
    "lengths": lengths,
    "padding": padding,
}
"""The function for each kind of rows, in the order of the page. `other` writes all other kinds."""
