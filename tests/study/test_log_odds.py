"""Log-odds and exact values: against plain loops over one token at a time, and against the world's own beliefs."""

import random
from dataclasses import replace

import pytest
import torch

from sapo_trl.study.task import (
    ModelSize,
    TaskConfig,
    believed_numbers,
    build_model,
    build_task_processor,
    exact_values,
    log_odds,
    make_problems,
    sample_problems,
    world_of,
    write_solution,
)
from sapo_trl.study.task.prompts import encode_prompts
from sapo_trl.study.task.vocabulary import FILLER_WORDS


TASK = TaskConfig(gates=3, signs=12, pictures=False, filler_choices=1)


def slow_log_odds(model, tokenizer, task, problem) -> list[tuple[float, float, float, float]]:
    """One prefix at a time: log-odds of the right cell and number, and their probabilities."""
    (row,) = make_problems(task, 1, seed=problem)
    problem = sample_problems(task, 1, seed=problem)[0]
    prompt = encode_prompts(tokenizer, [row])["input_ids"][0].tolist()
    found, text = [], ""
    for label, sign, cell in zip("abc", problem.signs, problem.right_cells, strict=True):
        text += f"{label} {sign} {FILLER_WORDS[0]}"
        number = str(problem.number(cell))
        numbers = []
        for options, right in (([f" {c}" for c in "ABCD"], f" {cell}"), (list("123456789"), number)):
            ids = torch.tensor([prompt + tokenizer(text)["input_ids"]])
            p = model(ids).logits[0, -1].double().softmax(-1)
            of = {option: p[tokenizer(option)["input_ids"][0]].item() for option in options}
            numbers.append((torch.tensor(of[right] / (sum(of.values()) - of[right])).log().item(), of[right]))
            text += right
        found.append((numbers[0][0], numbers[1][0], numbers[0][1], numbers[1][1]))
        text += " ok\n"
    return found


def test_log_odds_are_those_of_one_prefix_at_a_time():
    tokenizer = build_task_processor(TASK)
    model = build_model(tokenizer, pictures=False, size=ModelSize(64, 2), seed=3).eval()
    problems = [sample_problems(TASK, 1, seed=seed)[0] for seed in range(3)]
    found = log_odds(model, tokenizer, TASK, problems, batch_size=2)
    assert found.decisions.shape == (3, 3) and found.chances.shape == (3, 3, 2)
    with torch.no_grad():
        for index in range(3):
            expected = torch.tensor(slow_log_odds(model, tokenizer, TASK, index), dtype=torch.float64)
            ours = torch.cat(
                [found.decisions[index, :, None], found.readings[index, :, None], found.chances[index]], 1
            )
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_the_model_s_state_and_the_random_numbers_stay_as_they_were():
    tokenizer = build_task_processor(TASK)
    model = build_model(tokenizer, pictures=False, size=ModelSize(64, 2)).train()
    before = torch.random.get_rng_state()
    log_odds(model, tokenizer, TASK, sample_problems(TASK, 2))
    assert model.training and torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="`problems` is empty"):
        log_odds(model, tokenizer, TASK, [])


def tokens_of(tokenizer, text: str) -> list[str]:
    return tokenizer.batch_decode([[i] for i in tokenizer(text)["input_ids"]])


class TestExactValues:
    CHANCES = torch.tensor([[[0.5, 0.9], [0.6, 0.8], [0.7, 1.0]]], dtype=torch.float64)

    def test_a_right_path_by_hand(self):
        tokenizer = build_task_processor(TASK)
        problem = sample_problems(TASK, 1)[0]
        tokens = tokens_of(tokenizer, write_solution(TASK, problem, problem.right_cells, rng=random.Random(0)))
        (values,) = exact_values([problem], [tokens], self.CHANCES)
        assert len(values) == len(tokens) + 1
        assert values[0] == pytest.approx(0.5 * 0.9 * 0.6 * 0.8 * 0.7) and values[-1] == 1.0
        steps = {(a, b) for a, b in zip(values, values[1:], strict=False) if a != b}
        # Only cells and numbers change the value, each by the inverse of its chance.
        assert sorted(round(b / a, 9) for a, b in steps) == sorted(round(1 / c, 9) for c in (0.5, 0.9, 0.6, 0.8, 0.7))
        changed = {t.strip() for t, a, b in zip(tokens, values, values[1:], strict=False) if a != b}
        assert changed <= set("ABCD123456789")

    def test_a_wrong_cell_and_a_wrong_number_end_all_hope(self):
        tokenizer = build_task_processor(TASK)
        problem = sample_problems(TASK, 1)[0]
        wrong = world_of(TASK).decoy[problem.signs[1]]
        cells = problem.right_cells[0] + wrong + problem.right_cells[2]
        tokens = tokens_of(tokenizer, write_solution(TASK, problem, cells, rng=random.Random(0)))
        (values,) = exact_values([problem], [tokens], self.CHANCES)
        place = [i for i, t in enumerate(tokens) if t.strip() in set("ABCD")][1]
        assert values[place] == pytest.approx(0.6 * 0.8 * 0.7) and set(values[place + 1 :]) == {0.0}
        numbers = [problem.number(c) for c in problem.right_cells]
        numbers[1] = numbers[1] % 9 + 1
        text = write_solution(TASK, problem, problem.right_cells, rng=random.Random(0), numbers=numbers)
        (values,) = exact_values([problem], [tokens_of(tokenizer, text)], self.CHANCES)
        assert values[place + 1] == pytest.approx(0.8 * 0.7) and set(values[place + 2 :]) == {0.0}

    def test_a_broken_response_keeps_its_value_until_it_ends(self):
        problem = sample_problems(TASK, 1)[0]
        (values,) = exact_values([problem], [["a", " nonsense", "\n"]], self.CHANCES)
        assert values[0] > 0 and values == [values[0]] * 3 + [0.0]


class TestReading:
    TASK = TaskConfig(gates=6, known=1.0, confidence=1.0, misread=0.4, reading=0.8)

    def test_the_share_of_misread_pairs(self):
        misread = world_of(self.TASK).misread
        assert len(misread) == round(0.4 * 36)
        assert all(number != wrong and 1 <= wrong <= 9 for (_, number), wrong in misread.items())
        assert world_of(replace(self.TASK, misread=0.0)).misread == {}
        assert world_of(replace(self.TASK, misread=0.0)).right == world_of(self.TASK).right

    def test_numbers_are_read_wrong_as_often_as_configured(self):
        rng, right = random.Random(0), []
        for problem in sample_problems(self.TASK, 1000):
            numbers = believed_numbers(self.TASK, problem, problem.right_cells, rng=rng)
            right += [n == problem.number(c) for n, c in zip(numbers, problem.right_cells, strict=True)]
        assert sum(right) / len(right) == pytest.approx(1 - 0.4 * 0.8, abs=0.03)

    @pytest.mark.parametrize("setting, value", [("misread", 1.5), ("reading", 0.4)])
    def test_wrong_dials(self, setting, value):
        with pytest.raises(ValueError, match=f"`{setting}` must be a number"):
            TaskConfig(**{setting: value})
