"""
Counts padding among all computed tokens, and the tokens that processes in lockstep wait for.

There is no model: the tokens of drawn rollouts are counted, which takes seconds on any machine. Prompts have a uniform
length between two numbers. Responses have log-normal lengths as in `update_cost.py`. The defaults come from the run
files for eight GPUs.

    python benchmarks/padding.py --out results

Padding is counted for three ways to compute a rollout. TRL pads all rows of a process to its longest prompt and its
longest response. The second way makes micro-batches of equally many rows, sorted by length. This package makes
micro-batches with `group_rows`. To train, a row shares a micro-batch with rows of its optimizer step. To score, it
shares one with rows of its rollout.

Under ZeRO-3 and FSDP, and to train under ZeRO-2, each micro-batch takes as long as the largest among all processes.
The tokens waited for are the sum of these largest micro-batches. They are counted for micro-batches of equally many
rows, for separate groups on each process (`group_rows`), and for the same cuts on all processes (`common_cuts`). This
package uses common cuts for training there.

It writes `padding.json` and, as tables for `docs/performance.md`, `padding.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from update_cost import lengths_of

from sapo_trl.trainer.padding import common_cuts, cut_rows, equal_groups, group_rows


# To train, rows of an optimizer step may share a micro-batch. To score, rows of the rollout may.
STAGES = ("train", "score")
WAYS = {"equal": "equally many rows, sorted by length", "own": "`group_rows`", "common": "`common_cuts`"}


def drawn_rollout(options: argparse.Namespace, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a rollout's prompts and of its responses, int64 `(P, rows)` each."""
    shape = (max(options.processes), options.rows)
    shortest, longest = options.prompts
    prompts = np.random.default_rng([draw, 1]).integers(shortest, longest + 1, shape)
    return prompts, np.array(lengths_of(prompts.size, options.completion_length, seed=draw)).reshape(shape)


def tokens_of(lengths: np.ndarray, groups: list[list[int]]) -> list[int]:
    """Tokens of each group, padded to its longest row."""
    return [len(group) * int(lengths[group].max()) for group in groups]


def micro_batches(lengths: np.ndarray, limits: np.ndarray, num_groups: int) -> dict[str, np.ndarray]:
    """
    Tokens of the micro-batches of each process, for each of the ways.

    Args:
        lengths (`np.ndarray`): int64 `(P, N, rows)`, tokens of the rows in N batches. Each batch is cut separately.
        limits (`np.ndarray`): int64 `(P,)`, largest number of tokens in a micro-batch.
        num_groups (`int`): number of micro-batches in a batch.

    Returns:
        `dict[str, np.ndarray]`: int64 `(P, N, num_groups)` each.
    """
    made: dict[str, list] = {name: [] for name in WAYS}
    for batch in lengths.swapaxes(0, 1):
        cuts = common_cuts(batch, num_groups, limits.max())
        made["equal"].append([tokens_of(rows, equal_groups(rows, num_groups)) for rows in batch])
        made["own"].append(
            [tokens_of(rows, group_rows(rows, num_groups, limit)) for rows, limit in zip(batch, limits, strict=True)]
        )
        made["common"].append([tokens_of(rows, cut_rows(rows, cuts)) for rows in batch])
    return {name: np.array(tokens).swapaxes(0, 1) for name, tokens in made.items()}


def count(prompts: np.ndarray, responses: np.ndarray, options: argparse.Namespace) -> dict[str, float]:
    """
    Count the padding of a rollout, and the tokens waited for.

    Args:
        prompts (`np.ndarray`): int64 `(P, rows)`, tokens of the prompts.
        responses (`np.ndarray`): int64 `(P, rows)`, tokens of the responses.
        options (`argparse.Namespace`): options of the command.

    Returns:
        `dict[str, float]`: shares of padding, tokens waited for per token needed, and the share of tokens waited for
        that common cuts save; by number of processes and stage.
    """
    lengths, columns = prompts + responses, prompts.max(1) + responses.max(1)
    found = {"padding/trl": 1 - lengths.sum() / (options.rows * columns.sum())}
    for stage in STAGES:
        batches = lengths.reshape(len(lengths), options.optimizer_steps if stage == "train" else 1, -1)
        num_groups = batches.shape[2] // options.micro_batch
        for processes in sorted(options.processes):
            # The limit is the tokens of a micro-batch of rows padded to all columns.
            limits = options.micro_batch * columns[:processes]
            made = micro_batches(batches[:processes], limits, num_groups)
            needed = lengths[:processes].sum()
            waited_for = {name: processes * tokens.max(0).sum() / needed for name, tokens in made.items()}
            found |= {f"waited_for/{processes}/{stage}/{name}": value for name, value in waited_for.items()}
            found[f"saved/{processes}/{stage}"] = 1 - waited_for["common"] / waited_for["own"]
        # `made` is now from the largest number of processes, with all drawn rows.
        found |= {f"padding/{stage}/{name}": 1 - needed / made[name].sum() for name in ("equal", "own")}
    return {name: float(value) for name, value in found.items()}


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Smallest, median and largest of each count, over the drawn rollouts."""
    counts = [count(*drawn_rollout(options, draw), options) for draw in range(options.draws)]
    found = {name: [each[name] for each in counts] for name in counts[0]}
    return {
        name: {"min": min(values), "median": statistics.median(values), "max": max(values)}
        for name, values in found.items()
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables, with the options of the draws."""

    def cell(name: str, form: str) -> str:
        found = report["counts"][name]
        return f"{found['min']:{form}} / **{found['median']:{form}}** / {found['max']:{form}}"

    options = report["options"]
    shortest, longest = options["prompts"]
    lines = [
        "| share of padding in all computed tokens | to train | to score |",
        "| --- | ---: | ---: |",
        f"| TRL: all to the longest of the rollout | {' | '.join([cell('padding/trl', '.1%')] * 2)} |",
    ]
    for way in ("equal", "own"):
        lines.append(f"| {WAYS[way]} | {' | '.join(cell(f'padding/{stage}/{way}', '.1%') for stage in STAGES)} |")
    lines += [
        "",
        f"| processes, to | {' | '.join(WAYS.values())} | saved by `common_cuts` instead of `group_rows` |",
        f"| --- |{' ---: |' * (len(WAYS) + 1)}",
    ]
    for processes in options["processes"]:
        for stage in STAGES:
            cells = [cell(f"waited_for/{processes}/{stage}/{way}", ".2f") for way in WAYS]
            cells.append(cell(f"saved/{processes}/{stage}", ".1%"))
            lines.append(f"| {processes}, {stage} | {' | '.join(cells)} |")
    lines += [
        "",
        "Each cell has smallest, median and largest number. The second table gives the tokens waited for per token "
        f"needed. {options['draws']} drawn rollouts of {options['rows']} responses per process, "
        f"{options['optimizer_steps']} optimizer steps each, micro-batches of {options['micro_batch']} rows on "
        f"average; responses of up to {options['completion_length']:,} tokens, prompts of {shortest:,} to "
        f"{longest:,}.",
    ]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200, help="rollouts to count")
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 8], help="numbers of processes in lockstep")
    parser.add_argument("--rows", type=int, default=64, help="responses of a rollout on each process")
    parser.add_argument("--optimizer_steps", type=int, default=4, help="optimizer steps per rollout")
    parser.add_argument("--micro_batch", type=int, default=4, help="average number of rows in a micro-batch")
    parser.add_argument("--completion_length", type=int, default=2048, help="tokens of the longest response")
    parser.add_argument("--prompts", nargs=2, type=int, default=[300, 1300], help="tokens of the shortest and longest")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the results")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Count, write, print."""
    options = parser().parse_args(sys.argv[1:] if argv is None else argv)
    if options.rows % (options.optimizer_steps * options.micro_batch) != 0:
        parser().error(
            f"--rows must be a multiple of --optimizer_steps times --micro_batch, "
            f"{options.optimizer_steps * options.micro_batch}, got {options.rows}"
        )
    given = {name: value for name, value in vars(options).items() if name != "out"}
    report = {"versions": {"numpy": np.__version__}, "options": given, "counts": measure(options)}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "padding.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.out / "padding.md").write_text(as_markdown(report))
    print(as_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
