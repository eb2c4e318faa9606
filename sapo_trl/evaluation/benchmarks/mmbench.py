r"""
MMBench, English dev, with circular evaluation if the file has rotated rows.

Paper: https://huggingface.co/papers/2307.06281. Schema: the card of `lmms-lab/MMBench`, with `index`, `question`,
`hint`, `answer` (a letter), `A` to `D` (a missing option is empty or `nan`), `category`, `image`, `source`,
`L2-category`, `comment`, `split`; configuration `en`, split `dev`. Its rows are from version 1.0. No copy of version
1.1 with a card was found. OpenCompass publishes version 1.1 as `MMBench_DEV_EN_V11.tsv`, with images as base64 text;
[`convert_tsv`] makes a parquet file of it.

A question is asked several times with its options rotated. Rows of one question have the same `index` modulo a
million. The question counts as solved (`circular`) if all its rows are right. Without rotated rows, each row is a
question.
"""

import base64
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from ..benchmark import Benchmark, Problem, Result, mean_accuracy
from .prompts import ONE_LETTER, ask, list_options
from .rows import is_given, read_row, to_image
from .scoring import score_choice, share_of_groups_all_right


ROTATION = 1_000_000


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    texts = ("index", "question", "hint", "answer", "A", "B", *({"C", "D"} & row.keys()))
    row = read_row(row, "mmbench", i, texts, ("image", "category"))
    given = {letter: row[letter] for letter in "ABCD" if is_given(row.get(letter))}
    letters, options = "".join(given), list(given.values())
    if row["answer"] not in given or not "ABCD".startswith(letters):
        raise ValueError(
            f"`answer` in row {i} of mmbench must be one of its options, which must be A, B and so on without a gap; "
            f"got {row['answer']!r} with the options {given}."
        )
    hint = f"{row['hint']}\n" if is_given(row["hint"]) else ""
    return Problem(
        id=str(int(row["index"])),
        prompt=ask(f"{hint}{row['question']}\n{list_options(options)}", ONE_LETTER, num_images=1),
        answer=row["answer"],
        images=[to_image(row["image"], f"`image` in row {i} of mmbench")],
        fields={"letters": letters, "options": options, "category": row["category"]},
    )


def aggregate(groups: Sequence[Sequence[Result]]) -> dict[str, float]:
    """The share of questions with all rotations right, and the mean over all rows."""
    return {"circular": share_of_groups_all_right(groups)} | mean_accuracy(groups)


def convert_tsv(source: Path, target: Path) -> None:
    """
    Write OpenCompass's TSV as a parquet file with images.

    Args:
        source (`Path`):
            `MMBench_DEV_EN_V11.tsv`. A short text in its column `image` is the index of another row with the image.
        target (`Path`):
            The parquet file.
    """
    csv.field_size_limit(2**31 - 1)  # images are longer than the module's default
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    images = {row["index"]: row["image"] for row in rows}
    for i, row in enumerate(rows):
        image = row["image"]
        if len(image) <= 64 and image not in images:
            raise ValueError(f"`image` in row {i} of {source} names the row {image!r}, which does not exist.")
        row["image"] = {"bytes": base64.b64decode(images.get(image, image)), "path": None}
        row["index"] = int(row["index"])
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(target)


MMBENCH = Benchmark(
    name="mmbench",
    title="MMBench",
    dataset="lmms-lab/MMBench",
    config="en",
    split="dev",
    to_problem=to_problem,
    score=score_choice,
    aggregate=aggregate,
    headline="circular",
    group_of=lambda problem: str(int(problem.id) % ROTATION),
    scoring_note=(
        "Circular evaluation is the authors' method. They let a language model match a response that their rules "
        "cannot read; here such a response is wrong. The rows on the hub are from version 1.0."
    ),
)


if __name__ == "__main__":
    convert_tsv(Path(sys.argv[1]), Path(sys.argv[2]))
