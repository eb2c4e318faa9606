r"""
We-Math, with its four-dimensional score.

Paper: https://huggingface.co/papers/2407.01284. Schema: `dataset_info.json` of a copy of `We-Math/We-Math` (its card
has no features), with the strings `ID`, `split`, `knowledge concept`, `question`, `option`, `answer`, `key`,
`knowledge concept description`, the int64 `question number` and the image `image_path`; testmini, 1,740 rows. `key` is
`2steps_1`, `2steps_2` or `2steps_multi`, and likewise `3steps_1` to `3steps_3` and `3steps_multi`; the rows of one
`ID` are a problem (`multi`) and its one-step parts. Formulas: the authors' `evaluation/four_dimensional_metrics.py`.

The answers to a problem's parts and to its whole show one of four results:

- insufficient knowledge (IK): the whole is wrong, and a part is wrong,
- inadequate generalization (IG): the whole is wrong, although all parts are right,
- complete mastery (CM): the whole is right, and all parts (strict) or any part (loose) are right,
- rote memorization (RM): the whole is right, but a part (strict) or every part (loose) is wrong.

IK, IG and CM are shares of all problems, and RM is a share of all solved problems. The score is CM + IG / 2.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..benchmark import Benchmark, Problem, Result, mean_accuracy
from .prompts import ONE_LETTER, ask
from .rows import read_row, to_image
from .scoring import choice_fields, lettered_options, score_choice


_KEY = re.compile(r"([23])steps_([123]|multi)")
# A text follows each label: `;C.;` is the end of a text about a point C. Some labels have only a space before them.
_LABELS = (r"(?:^|[;；\n])\s*LETTER\s*[.:．：]\s*(?=[^\s;；])", r"\sLETTER\s*[.．]\s*(?=[^\s;；])")


def to_problem(row: Mapping[str, Any], i: int) -> Problem:
    row = read_row(row, "wemath", i, ("ID", "question", "option", "answer", "key"), ("image_path",))
    if not _KEY.fullmatch(row["key"]):
        raise ValueError(
            f"`key` in row {i} of wemath must look like `2steps_1` or `3steps_multi`, got {row['key']!r}."
        )
    answer = row["answer"].strip()
    return Problem(
        id=f"{row['ID']}/{row['key']}",
        prompt=ask(f"{row['question']}\n{row['option']}", ONE_LETTER, num_images=1),
        answer=answer,
        images=[to_image(row["image_path"], f"`image_path` in row {i} of wemath")],
        fields=choice_fields(lettered_options(row["option"], *_LABELS), answer) | {"ID": row["ID"], "key": row["key"]},
    )


def group_of(problem: Problem) -> str:
    """The key of a problem and its parts. Two-step and three-step problems are numbered separately."""
    return f"{problem.fields['key'].partition('_')[0]}/{problem.fields['ID']}"


def aggregate(groups: Sequence[Sequence[Result]]) -> dict[str, float]:
    """The scores and their parts. A row without an answer counts as wrong."""
    counts = dict.fromkeys(("ik", "ig", "cm_strict", "cm_loose", "rm_strict", "rm_loose"), 0)
    for group in groups:
        right = {result.fields["key"] for result in group if result.correct == 1.0}
        steps = int(_KEY.fullmatch(group[0].fields["key"])[1])
        parts = [f"{steps}steps_{part}" in right for part in range(1, steps + 1)]
        if f"{steps}steps_multi" in right:
            counts["cm_strict" if all(parts) else "rm_strict"] += 1
            counts["cm_loose" if any(parts) else "rm_loose"] += 1
        else:
            counts["ig" if all(parts) else "ik"] += 1
    metrics = {}
    for kind in ("strict", "loose"):
        mastered, memorized = counts[f"cm_{kind}"], counts[f"rm_{kind}"]
        metrics[kind] = (mastered + counts["ig"] / 2) / len(groups)
        metrics[f"complete_mastery_{kind}"] = mastered / len(groups)
        metrics[f"rote_memorization_{kind}"] = memorized / (mastered + memorized) if mastered + memorized else 0.0
    metrics["insufficient_knowledge"] = counts["ik"] / len(groups)
    metrics["inadequate_generalization"] = counts["ig"] / len(groups)
    return metrics | mean_accuracy(groups)


WEMATH = Benchmark(
    name="wemath",
    title="WeMath",
    dataset="We-Math/We-Math",
    split="testmini",
    to_problem=to_problem,
    score=score_choice,
    aggregate=aggregate,
    headline="strict",
    group_of=group_of,
    scoring_note=(
        "The authors take the first character after the last `Answer` of a response; here the letter is read from the "
        "box, or by rules. The score is the authors' score, but they divide by 525 problems even if fewer were asked."
    ),
)
