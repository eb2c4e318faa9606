"""The demo's task: the reward of real data agrees with the study's own, and solutions fit into a response."""

import random
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from sapo_trl.rewards import accuracy_reward
from sapo_trl.study.boxed import (
    boxed_solution,
    build_boxed_processor,
    longest_response,
    warm_start,
    warm_start_config,
)
from sapo_trl.study.task import TaskConfig, believed_cells, code_reward, make_problems, sample_problems


TASK = warm_start_config().task


@pytest.fixture(scope="module")
def tokenizer():
    return build_boxed_processor().tokenizer


def solutions(task, n):
    rng = random.Random(0)
    for problem in sample_problems(task, n):
        cells = believed_cells(task, problem, rng=rng)
        yield problem, cells, boxed_solution(task, problem, cells, rng=rng)


@pytest.mark.parametrize("gates", [1, 4, 7])
def test_the_answer_check_of_real_data_agrees_with_the_study(gates):
    """The right cells alone give the reward, as the study's own reward function says from the lines before the box."""
    task = replace(TASK, gates=gates)
    problems, cells, texts = zip(*solutions(task, 60), strict=True)
    answers = [problem.answer for problem in problems]
    expected = [float(own == problem.right_cells) for own, problem in zip(cells, problems, strict=True)]
    assert set(expected) == {0.0, 1.0}
    assert accuracy_reward(completions=list(texts), answer=answers) == expected
    assert code_reward(completions=list(texts), answer=answers) == expected


@pytest.mark.parametrize("task", [TASK, TaskConfig(gates=2, filler=3, preamble=4), TaskConfig(reveal_delay=2)])
def test_solutions_fit_into_a_response(tokenizer, task):
    for _, _, text in solutions(task, 30):
        ids = tokenizer(text + tokenizer.eos_token)["input_ids"]
        assert longest_response(task) - 8 <= len(ids) <= longest_response(task)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_box_is_one_token_also_after_loading(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for own in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert own.convert_ids_to_tokens(own("\n\\boxed{73}")["input_ids"]) == ["Ċ", "\\boxed{", "7", "3", "}"]


def test_the_demo_starts_often_wrong_but_with_something_to_learn_from():
    rewards = []
    for seed in range(5):
        task = warm_start_config(seed).task
        problems = sample_problems(task, 400, seed=seed)
        rng = random.Random(seed)
        rewards += [believed_cells(task, p, rng=rng) == p.right_cells for p in problems]
    # Each decision is right with probability .75 · .8 + .25 · .2.
    assert sum(rewards) / len(rewards) == pytest.approx(0.65**4, abs=0.03)


def test_a_finished_warm_start_is_found_and_a_failed_one_says_so(tmp_path):
    instant = replace(warm_start_config(), target=0.0, cooldown_steps=1)
    folder = warm_start(tmp_path, instant)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert warm_start(tmp_path, instant) == folder and folder.name.startswith("boxed-")
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert warm_start(tmp_path, replace(instant, batch_size=2)) != folder
    with pytest.raises(RuntimeError, match="After 0 steps .* writes 0.0% of the lines"):
        warm_start(tmp_path, replace(instant, target=0.9, max_steps=0))


def test_the_data_set_has_the_columns_of_real_data():
    rows = make_problems(TASK, 3, split="test")
    assert rows.column_names == ["images", "problem", "answer"]
    assert all(row["problem"].startswith("<image>a ") and len(row["answer"]) == TASK.gates for row in rows)
