"""
The planner's numbers for the files in `trainer_configs/`, as tables in `docs/scaling.md`.

`python -m docs.generate.scaling_table` writes them into the folder it is called in, a clone of the repository.
"""

from __future__ import annotations

from pathlib import Path

from sapo_trl.planner.advice import suggest
from sapo_trl.planner.command import parser as plan_parser
from sapo_trl.planner.memory import MemoryPlan, plan_memory
from sapo_trl.planner.reading import read_setup
from sapo_trl.planner.setup import GIB, Setup

from .run_configs import FOLDER, RUNS


DOCUMENT = Path("docs/scaling.md")
MARKERS = {
    "memory": ("<!-- memory: start -->", "<!-- memory: end -->"),
    "changes": ("<!-- changes: start -->", "<!-- changes: end -->"),
}

_COLUMNS = {
    "weights": ("policy", "critic", "reference"),
    "gradients and optimizer": ("gradients", "optimizer", "gradient buckets", "float32 gradients"),
    "activations": (
        "activations",
        "corrupted activations",
        "LM head",
        "gathered weights",
        "half-precision copies",
        "prefill",
    ),
    "generation": ("vLLM", "KV cache", "next-token scores"),
    "other": ("rollout buffer", "corrupted pixels", "overhead"),
}

_TOO_MUCH = (
    ("geo3k_qwen2.5_vl_3b_sapo", {"sharding": "none"}),
    ("geo3k_qwen2.5_vl_7b_sapo", {"sharding": "none"}),
    ("geo3k_qwen2.5_vl_7b_sapo", {"sharding": "zero2"}),
    ("geo3k_qwen2.5_vl_7b_sapo", {"processes": 1, "sharding": "none", "accumulation": 32}),
    ("math_rho_1.1b_sapo", {"gpu_memory_gib": 24.0}),
)
"""File, and changes of its machine."""


def setup_of(name: str, folder: Path = FOLDER) -> Setup:
    """The setup of a file in `trainer_configs/`, on the machine that it names."""
    return read_setup(plan_parser().parse_args(["--config", str(folder / f"{name}.yaml")]))


def memory_table(folder: Path = FOLDER) -> str:
    """One row for each file, in GiB per GPU at the peak."""
    lines = [
        _row(["File", "GPUs", "Sharding", *_COLUMNS, "total"]),
        _row(["---", "---", "---", *["---:"] * (len(_COLUMNS) + 1)]),
    ]
    for run in RUNS:
        plan = plan_memory(setup_of(run.name, folder))
        setup = plan.setup
        sizes = [_gib(_sum(plan, names)) for names in _COLUMNS.values()]
        machine = f"{setup.processes} x {setup.gpu_memory_gib:g} GiB"
        total = _gib(plan.total) if plan.fits else f"**{_gib(plan.total)}**"
        lines.append(_row([f"`{run.name}`", machine, setup.sharding, *sizes, total]))
    return "\n".join(lines)


def changes_table(folder: Path = FOLDER) -> str:
    """Setups that do not fit, and the smallest changes after which they do."""
    lines = [_row(["File", "On", "GiB", "Fits with"]), _row(["---", "---", "---:", "---"])]
    for name, changes in _TOO_MUCH:
        setup = setup_of(name, folder).changed(**changes)
        machine = f"{setup.processes} x {setup.gpu_memory_gib:g} GiB, sharding {setup.sharding}"
        found = [
            f"{' and '.join(f'`{change}`' for change in suggestion.changes)} "
            f"({_gib(plan_memory(suggestion.setup).total)})"
            for suggestion in suggest(setup)
        ]
        cell = "<br>or ".join(found) or "no three of the planner's changes"
        lines.append(_row([f"`{name}`", machine, _gib(plan_memory(setup).total), cell]))
    return "\n".join(lines)


def _sum(plan: MemoryPlan, names: tuple[str, ...]) -> float:
    at_peak = {**plan.resident, **plan.phases[plan.peak_phase]}
    return sum(at_peak.get(name, 0.0) for name in names)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the tables."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in (("memory", memory_table()), ("changes", changes_table())):
        start, end = MARKERS[name]
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n\n{table}\n\n{end}{after}"
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
