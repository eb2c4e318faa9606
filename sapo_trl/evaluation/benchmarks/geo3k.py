r"""
Geometry3K, free form: the test split of `hiyouga/geometry3k`.

Paper: https://huggingface.co/papers/2105.04165. Schema: the data set's card, with `images`, `problem` (one `<image>`
an image), `answer` (LaTeX such as `6 \sqrt { 3 }`), and since a later commit `id`, `choices` and `ground_truth`, which
are not used here; 601 rows.
"""

from collections.abc import Mapping
from typing import Any

from ...data.templates import TEMPLATES
from ..benchmark import Benchmark, Problem
from .prompts import ask
from .rows import read_row, to_images
from .scoring import score_mathematics


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    row = read_row(row, "geo3k", i, ("problem", "answer"), ("images",))
    images = to_images(row["images"], f"`images` in row {i} of geo3k")
    # The published recipe's, with which models are trained on this data set.
    prompt = ask(row["problem"], TEMPLATES["think_boxed"], len(images), in_place=True)
    return Problem(id=str(i), prompt=prompt, answer=row["answer"].strip(), images=images)


GEO3K = Benchmark(
    name="geo3k",
    title="Geo3K",
    dataset="hiyouga/geometry3k",
    split="test",
    to_problem=to_problem,
    score=score_mathematics,
    scoring_note=(
        "Published runs of this recipe compare with mathruler; here it is the judge of `accuracy_reward`. lmms-eval's "
        "`geometry3k` is another task: it lists four options and asks for a letter."
    ),
)
