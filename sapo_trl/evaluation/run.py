"""One run: generate the missing answers, score all answers, write results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..embedded import default_cache_dir, warm_start
from ..files import write_json
from ..folder_lock import locked
from ..json_files import NUMBER, Each, read_json
from .backends import BATCH_SIZES, Backend, Request, generation_seed, make_backend
from .benchmark import TASK, Benchmark
from .judge import Judge
from .page import write_page
from .progress import Steps
from .provenance import environment, weights_fingerprint
from .results import RESULTS_NAME, run_results
from .rows import Rows, load_rows
from .scoring import score_run
from .settings import EvalArguments, chosen_benchmarks
from .store import GenerationStore
from .tables import make_tables, write_tables


EVAL_NAME = "eval.json"
EMBEDDED = "embedded"
_RECORD = {
    "model_name": str,
    "settings": {
        **dict.fromkeys(("model", "backend"), str),
        **dict.fromkeys(("temperature", "top_p"), NUMBER),
        **dict.fromkeys(("n", "max_new_tokens", "seed"), int),
    },
    "weights": dict,
    "benchmarks": Each({"source": str, "asked": int, "belonging": int, "fingerprint": str}),
    "environments": list,
}
"""Required fields of an `eval.json`."""


def run_evaluation(
    arguments: EvalArguments, benchmarks: Mapping[str, Benchmark], console: Console | None = None
) -> dict[str, Any]:
    """
    Evaluate a model, or continue an interrupted evaluation.

    Args:
        arguments ([`EvalArguments`]): model, benchmarks, sampling.
        benchmarks (`Mapping[str, Benchmark]`): all known benchmarks, by name.
        console ([`~rich.console.Console`], *optional*): console for the progress.

    Returns:
        `dict`: the content of `results.json`.

    Raises:
        ValueError: for wrong settings, rows or run folders.
        [`~sapo_trl.evaluation.judge.JudgeError`]: if the judge cannot be used. Everything else is kept.
    """
    console = console or Console()
    folder = arguments.run_folder
    if arguments.score_only:
        if not (folder / EVAL_NAME).is_file():
            raise ValueError(f"`score_only`: {str(folder)!r} has no {EVAL_NAME}, so there is nothing to score.")
        with locked(folder, "evaluates"):
            return _score(arguments, benchmarks, console)
    paths = chosen_benchmarks(arguments.benchmarks, benchmarks)
    with locked(folder, "evaluates"):
        _generate_missing(arguments, benchmarks, paths, console)
        return _score(arguments, benchmarks, console)


def _generate_missing(
    arguments: EvalArguments,
    benchmarks: Mapping[str, Benchmark],
    paths: Mapping[str, str | None],
    console: Console,
) -> None:
    folder = arguments.run_folder
    model = arguments.model
    if model == EMBEDDED:
        model = str(warm_start(default_cache_dir()))
    located = replace(arguments, model=model)
    rows = {
        name: load_rows(
            benchmarks[name],
            path,
            limit=arguments.limit,
            min_pixels=arguments.min_pixels,
            max_pixels=arguments.max_pixels,
        )
        for name, path in paths.items()
    }
    store = GenerationStore(folder)
    _check_rows(rows, arguments.n, store, console)
    record = _record(arguments, located, rows)
    _check_same_run(folder, record)
    write_json(folder / EVAL_NAME, record)
    total = sum(len(of_benchmark.numbers) for of_benchmark in rows.values()) * arguments.n
    done = sum(
        (name, row, generation) in store.done
        for name, of_benchmark in rows.items()
        for row in of_benchmark.numbers
        for generation in range(arguments.n)
    )
    if done == total:
        console.print(f"Generations: all {total} exist already.", highlight=False)
        return
    backend = make_backend(located)
    with Steps(console, "Generating", total, done) as steps:
        for of_benchmark in rows.values():
            _generate(of_benchmark, arguments, backend, store, steps)
    store.merge()


def _check_rows(rows: Mapping[str, Rows], n: int, store: GenerationStore, console: Console) -> None:
    """Check every unanswered row before the first generation, so that a bad row does not cost hours."""
    pending = {
        name: [
            row
            for row in of_benchmark.numbers
            if any((name, row, generation) not in store.done for generation in range(n))
        ]
        for name, of_benchmark in rows.items()
    }
    with Steps(console, "Reading rows", sum(map(len, pending.values()))) as steps:
        for name, numbers in pending.items():
            rows[name].check(numbers, steps.advance)


def _generate(rows: Rows, arguments: EvalArguments, backend: Backend, store: GenerationStore, steps: Steps) -> None:
    """
    Make all generations of a benchmark, batch by batch. Each batch is stored before the next begins.

    Batches are cut from the list of all generations, including stored ones. A continued run therefore has the same
    batches as an uninterrupted run, and so the same texts, to the last digit of a logit.
    """
    name = rows.benchmark.name
    everything = [(row, generation) for row in rows.numbers for generation in range(arguments.n)]
    size = arguments.batch_size or BATCH_SIZES[arguments.backend]
    for start in range(0, len(everything), size):
        batch = [key for key in everything[start : start + size] if (name, *key) not in store.done]
        if not batch:
            continue
        problems = {row: rows.problem(row) for row in dict.fromkeys(row for row, _ in batch)}
        seeds = [generation_seed(arguments.seed, name, problems[row].id, number) for row, number in batch]
        requests = [
            Request(problems[row].prompt, seed, problems[row].images)
            for (row, _), seed in zip(batch, seeds, strict=True)
        ]
        generated = backend.generate(requests)
        store.add(
            name,
            problems.items(),
            [
                {"row": row, "id": problems[row].id, "generation": number, "seed": seed, **asdict(generation)}
                for (row, number), seed, generation in zip(batch, seeds, generated, strict=True)
            ],
        )
        steps.advance(len(batch))


def _score(arguments: EvalArguments, benchmarks: Mapping[str, Benchmark], console: Console) -> dict[str, Any]:
    folder = arguments.run_folder
    record = read_json(folder / EVAL_NAME, _RECORD)
    unknown = [name for name in record["benchmarks"] if name not in benchmarks]
    if unknown:
        remedy = " Name the run file of `task` with `--config`." if TASK in unknown else ""
        raise ValueError(f"{str(folder / EVAL_NAME)!r} has unknown benchmarks: {', '.join(unknown)}.{remedy}")
    known = {name: benchmarks[name] for name in record["benchmarks"]}
    judge = Judge(arguments, folder) if arguments.judge_url else None
    store = GenerationStore(folder)
    scores = score_run(folder, store, known, console, judge, arguments.judge_when)
    sizes = {name: entry["belonging"] for name, entry in record["benchmarks"].items()}
    results = results_record(
        record["settings"]["model"],
        record["model_name"],
        _settings_line(record["settings"]),
        run_results(known, sizes, record["settings"]["n"], store, scores),
    )
    write_results(folder, results)
    write_page(folder, results, store, scores, arguments.page_answers)
    return results


def results_record(model: str, name: str, settings_line: str, benchmarks: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `results.json`."""
    return {"name": name, "model": model, "settings_line": settings_line, "benchmarks": dict(benchmarks)}


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json` and the run's own tables."""
    write_json(folder / RESULTS_NAME, results)
    write_tables(folder, make_tables([results]))


def _record(arguments: EvalArguments, located: EvalArguments, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """The content of `eval.json`: everything that decides the generations or explains the scores."""
    weights = {"model": weights_fingerprint(located.model, arguments.revision)}
    if arguments.adapter:
        weights["adapter"] = weights_fingerprint(arguments.adapter, config="adapter_config.json")
    return {
        "model_name": arguments.model_name,
        "settings": arguments.identity(),
        "weights": weights,
        "benchmarks": {
            name: {
                "title": of_benchmark.benchmark.title,
                "source": of_benchmark.source,
                "config": of_benchmark.benchmark.config,
                "split": of_benchmark.benchmark.split,
                "rows": len(of_benchmark.dataset),
                "belonging": of_benchmark.belonging,
                "asked": len(of_benchmark.numbers),
                "fingerprint": of_benchmark.fingerprint,
                "headline": of_benchmark.benchmark.headline,
                "scoring_note": of_benchmark.benchmark.scoring_note,
            }
            for name, of_benchmark in rows.items()
        },
        "environments": [environment()],
    }


def _check_same_run(folder: Path, record: dict[str, Any]) -> None:
    """
    Compare `record` with the folder's `eval.json`, and add the file's other benchmarks and environments to `record`.

    Raises:
        ValueError: with the different setting.
    """
    path = folder / EVAL_NAME
    if not path.is_file():
        return
    before = read_json(path, _RECORD)
    there = f"{str(folder)!r} holds a run"
    remedy = "Use its settings to continue it, or choose another `output_dir`."
    for name, value in record["settings"].items():
        if before["settings"].get(name) != value:
            raise ValueError(f"{there} with {name}={before['settings'].get(name)!r}, not {value!r}. {remedy}")
    for part, fingerprint in record["weights"].items():
        if before["weights"].get(part) != fingerprint:
            raise ValueError(f"{there} with other weights under the same `{part}`, which has changed since. {remedy}")
    for name, entry in record["benchmarks"].items():
        known = before["benchmarks"].get(name)
        if known is not None and known["fingerprint"] != entry["fingerprint"]:
            raise ValueError(
                f"{there} on other rows of {name!r} ({known['source']!r}, {known['asked']} problems; now "
                f"{entry['source']!r}, {entry['asked']} problems). {remedy}"
            )
    record["benchmarks"] = before["benchmarks"] | record["benchmarks"]
    if before["environments"][-1:] == record["environments"]:
        record["environments"] = before["environments"]
    else:
        record["environments"] = [*before["environments"], *record["environments"]]


def _settings_line(settings: Mapping[str, Any]) -> str:
    parts = [f"temperature {settings['temperature']:g}", f"top-p {settings['top_p']:g}", f"n {settings['n']}"]
    parts += [f"at most {settings['max_new_tokens']} tokens", f"seed {settings['seed']}", settings["backend"]]
    return ", ".join(parts)
