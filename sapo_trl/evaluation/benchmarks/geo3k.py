r"""
Geometry3K, free form: the test split of `hiyouga/geometry3k`.

Paper: https://huggingface.co/papers/2105.04165. Schema: the data set's card, with `images`, `problem` (one `<image>`
for each image) and `answer` (LaTeX such as `6 \sqrt { 3 }`); 601 rows. A later commit added `id`, `choices` and
`ground_truth`, which are not used here.
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
    # The template of the published recipe. Models are trained on this data set with it.
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
        "Published runs of this recipe compare answers with mathruler; here the judge of `accuracy_reward` does. "
        "lmms-eval's `geometry3k` is another task: it lists four options and asks for a letter."
    ),
)
