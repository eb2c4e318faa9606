"""
The demo's numbers over several seeds.

    for seed in 0 1 2 3 4; do sapo-trl demo --seed $seed --output_dir outputs/demo_$seed; done
    python benchmarks/demo_seeds.py outputs/demo_* --out benchmarks/results/demo

writes `seeds.json`, the results without their responses, and prints the table. Without folders, it prints the table of
the `seeds.json` in `--out`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any


KEPT = (
    "seed",
    "test_problems",
    "accuracy_before",
    "accuracy_after",
    "greedy_accuracy_before",
    "greedy_accuracy_after",
    "explained_variance",
    "training_accuracy",
    "responses_per_rollout",
    "seconds",
    "cpu_seconds",
)


def collect(folders: list[Path]) -> list[dict[str, Any]]:
    """The results of some runs of the demo, by seed."""
    found = [json.loads((folder / "results.json").read_text()) for folder in folders]
    return sorted(({name: results[name] for name in KEPT} for results in found), key=lambda run: run["seed"])


def as_markdown(runs: list[dict[str, Any]]) -> str:
    """A table with a line for each seed, and the mean of each column."""
    columns = {
        "sampled, before": ("accuracy_before", "{:.1%}"),
        "after": ("accuracy_after", "{:.1%}"),
        "greedy, before": ("greedy_accuracy_before", "{:.1%}"),
        "after ": ("greedy_accuracy_after", "{:.1%}"),
        "explained variance": ("explained", "{:.2f}"),
        "minutes of CPU time": ("minutes", "{:.1f}"),
    }
    rows = [
        {**run, "minutes": run["cpu_seconds"] / 60, "explained": statistics.mean(run["explained_variance"])}
        for run in runs
    ]
    lines = [
        f"| Seed | {' | '.join(name.strip() for name in columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
    ]
    for row in rows:
        lines.append(f"| {row['seed']} | {' | '.join(form.format(row[key]) for key, form in columns.values())} |")
    if len(rows) > 1:
        means = [form.format(statistics.mean(row[key] for row in rows)) for key, form in columns.values()]
        lines.append(f"| mean | {' | '.join(means)} |")
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    """Collect, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of the demo's runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/demo"), help="folder of seeds.json")
    options = parser.parse_args(argv)
    path = options.out / "seeds.json"
    if options.runs:
        options.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(collect(options.runs), indent=1) + "\n")
    print(as_markdown(json.loads(path.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
