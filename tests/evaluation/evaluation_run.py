"""Small benchmarks for the evaluation's tests, and `sapo-trl eval` on them as a process that can be killed."""

import sys
from collections.abc import Sequence

from sapo_trl.data import geometry_prompt
from sapo_trl.evaluation.benchmark import Benchmark, Problem, Result, Score
from sapo_trl.evaluation.benchmarks.rows import to_image
from sapo_trl.evaluation.command import main
from sapo_trl.rewards.completion import last_boxed


def drawn_problem(row, number: int) -> Problem:
    prompt = geometry_prompt(row)
    return Problem(
        id=f"drawn-{number}",
        prompt=prompt["prompt"],
        answer=row["answer"],
        images=[to_image(image, f"row {number}") for image in prompt["images"]],
        fields={"pair": number // 2},
    )


def text_problem(row, number: int) -> Problem:
    return Problem(id=row["name"], prompt=[{"role": "user", "content": row["question"]}], answer=row["answer"])


def boxed_score(problem: Problem, text: str) -> Score:
    answer = last_boxed(text)
    return Score(float(answer == problem.answer), answer)


def worst_case(groups: Sequence[Sequence[Result]]) -> dict[str, float]:
    """The share of groups in which all is right, and the plain mean."""
    scores = [[result.correct for result in group] for group in groups]
    every = [score for group in scores for score in group]
    return {"worst_case": sum(map(min, scores)) / len(scores), "average": sum(every) / len(every)}


DRAWN = Benchmark(
    name="drawn",
    title="Drawn",
    dataset="nobody/drawn",
    split="test",
    to_problem=drawn_problem,
    score=boxed_score,
    aggregate=worst_case,
    headline="worst_case",
    group_of=lambda problem: str(problem.fields["pair"]),
)
TEXT = Benchmark(
    name="text", title="Text", dataset="nobody/text", split="test", to_problem=text_problem, score=boxed_score
)
TOYS = {benchmark.name: benchmark for benchmark in (DRAWN, TEXT)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], TOYS))
