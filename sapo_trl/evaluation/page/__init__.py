"""A page to look through a run's answers: one HTML file that needs no other and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ...files import write_text
from ...foreign_text import visible
from ..backends import prompt_text
from ..store import GenerationStore, stored_problem


PAGE_NAME = "answers.html"
IMAGE_BYTES = 48_000_000
"""Of all pictures together; a page of hundreds of megabytes opens nowhere."""

NO_ANSWER, RIGHT, PARTLY, WRONG = "none", "right", "partly", "wrong"


def write_page(
    folder: Path,
    results: Mapping[str, Any],
    store: GenerationStore,
    scores: Sequence[Mapping[str, Any]],
    most_answers: int = 5000,
) -> Path:
    """
    Write `answers.html` to a run folder.

    Args:
        folder (`Path`): the run folder.
        results (`Mapping`): content of its `results.json`.
        store ([`GenerationStore`]): problems and generations.
        scores (`Sequence[Mapping]`): rows of `scoring.SCORES`.
        most_answers (`int`, *optional*, defaults to `5000`): generations at most; each benchmark has its share of
            them, its first problems.

    Returns:
        `Path`: the file.
    """
    problems = _problems(store, scores, most_answers)
    path = folder / PAGE_NAME
    write_text(path, render_page(results, problems, len(scores)))
    return path


def render_page(results: Mapping[str, Any], problems: Sequence[Mapping[str, Any]], total: int) -> str:
    """The page's HTML. Everything in `problems` and `results` is text that is escaped, never markup."""
    assets = files(__package__)
    script = (assets / "answers.js").read_text(encoding="utf-8")
    # With autoescape and, as a second guard, a policy that allows only the script with this hash.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    template = environment.from_string((assets / "answers.html.j2").read_text(encoding="utf-8"))
    return template.render(
        results=results,
        problems=problems,
        shown=sum(len(problem["generations"]) for problem in problems),
        total=total,
        style=(assets / "answers.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
    )


def _shown(value: Any) -> Any:
    """A value as the template writes it. Its own parts, which are markup, stay as they are."""
    return value if isinstance(value, Markup) else visible(str(value))


def _problems(store: GenerationStore, scores: Sequence[Mapping[str, Any]], most_answers: int) -> list[dict[str, Any]]:
    texts = {(row["benchmark"], row["row"], row["generation"]): row for row in store.generations()}
    of_problem: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    for score in scores:
        of_problem[score["benchmark"], score["row"]].append(score)
        sizes[score["benchmark"]] += 1
    share = min(1.0, most_answers / max(len(scores), 1))
    taken: dict[str, int] = defaultdict(int)
    bytes_left = IMAGE_BYTES
    shown = []
    for row in store.problems():
        name, entries = row["benchmark"], of_problem.get((row["benchmark"], row["row"]), [])
        if not entries or taken[name] + len(entries) > share * sizes[name]:
            continue
        taken[name] += len(entries)
        size = sum(map(len, row["thumbnails"]))
        images = [base64.b64encode(image).decode() for image in row["thumbnails"]] if size <= bytes_left else []
        bytes_left -= size if images else 0
        problem = stored_problem(row)
        generations = [
            _generation(score, texts[name, row["row"], score["generation"]])
            for score in sorted(entries, key=lambda score: score["generation"])
        ]
        shown.append(
            {
                "benchmark": name,
                "id": problem.id,
                "question": prompt_text(problem.prompt),
                "answer": problem.answer,
                "fields": {key: value for key, value in problem.fields.items() if value not in (None, "", [], {})},
                "images": images,
                "left_out": len(row["thumbnails"]) - len(images),
                "generations": generations,
                "right": sum(generation["verdict"] == RIGHT for generation in generations),
            }
        )
    return shown


def _generation(score: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    if score["correct"] == 1.0:
        verdict = RIGHT
    elif score["correct"] > 0.0:
        verdict = PARTLY
    else:
        verdict = NO_ANSWER if score["extracted"] is None else WRONG
    return {
        "number": score["generation"],
        "verdict": verdict,
        "extracted": score["extracted"],
        "scorer": score["scorer"],
        "overruled": score["correct"] != score["rules"],
        "error": score["error"],
        "text": generation["text"],
        "tokens": generation["tokens"],
        "is_cut": generation["finish_reason"] == "length",
    }
