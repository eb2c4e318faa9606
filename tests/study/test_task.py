import itertools
import random
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_trl.segmentation import NewlineSegmenter
from sapo_trl.study.task import (
    ModelSize,
    OracleSegmenter,
    TaskConfig,
    WarmStartConfig,
    believed_cells,
    build_model,
    build_task_processor,
    code_reward,
    encode_prompts,
    evaluate_task,
    longest_response,
    make_problems,
    read_steps,
    sample_problems,
    to_task_prompts,
    warm_start,
    world_of,
    write_solution,
)
from sapo_trl.study.task.drawing import draw_cells
from sapo_trl.study.task.problems import SPLITS, pictures_of
from sapo_trl.study.task.vocabulary import CELLS, FILLER_WORDS, LABELS, RIGHT, SIGNS, WRONG
from sapo_trl.study.task.warm_start import IGNORED_LABEL, encode_solutions


TEXT_TASK = TaskConfig(gates=3, signs=12, pictures=False)


@pytest.fixture(scope="module")
def tokenizer():
    return build_task_processor(TEXT_TASK)


tasks = st.builds(
    TaskConfig,
    gates=st.integers(1, 16),
    signs=st.integers(2, len(SIGNS)),
    known=st.floats(0, 1),
    confidence=st.floats(0.5, 1),
    filler=st.integers(0, 3),
    filler_choices=st.integers(1, len(FILLER_WORDS)),
    preamble=st.integers(0, 4),
    reveal_delay=st.sampled_from([None, 0, 1]),
    pictures=st.booleans(),
    world=st.integers(0, 100),
)


# --------------------------------------------------------------------------------------------------------------- dials


@pytest.mark.parametrize(
    "setting, value, hint",
    [
        ("gates", 0, "from 1 to 16"),
        ("gates", 17, "from 1 to 16"),
        ("gates", 2.0, "from 1 to 16"),
        ("signs", 1, "from 2 to 120"),
        ("known", 1.5, "from 0.0 to 1.0"),
        ("confidence", 0.4, "from 0.5 to 1.0"),
        ("filler", -1, "from 0 to 8"),
        ("filler_choices", 0, "from 1 to 8"),
        ("preamble", 33, "from 0 to 32"),
        ("reveal_delay", 7, "from 0 to 6 or None"),
        ("pictures", "yes", "True or False"),
        ("world", -1, "from 0 to"),
    ],
)
def test_a_wrong_dial_is_named_with_its_value_and_what_would_be_right(setting, value, hint):
    with pytest.raises(ValueError, match=rf"`{setting}` must be .*{hint}.*, got {re.escape(repr(value))}"):
        TaskConfig(**{setting: value})


# ------------------------------------------------------------------------------------------------------------ problems


def test_answers_are_what_the_signs_mean_in_the_picture():
    config = TaskConfig(gates=5)
    meaning = world_of(config).right
    for problem in sample_problems(config, 200, seed=1):
        lines = [line.split() for line in problem.chain.split("\n")]
        assert [label for label, _ in lines] == list("abcde")
        shown = dict(item for item in zip("ABCD", problem.numbers, strict=True))
        assert problem.answer == "".join(str(shown[meaning[sign]]) for _, sign in lines)


def test_one_wrong_decision_is_a_wrong_answer():
    for problem in sample_problems(TaskConfig(gates=3), 20):
        answers = {problem.code("".join(cells)) for cells in itertools.product(CELLS, repeat=3)}
        assert len(answers) == 4**3


def test_splits_share_no_picture():
    pictures = [set(pictures_of(split)) for split in SPLITS]
    assert sum(map(len, pictures)) == len(set.union(*pictures)) == 9 * 8 * 7 * 6
    for split in SPLITS:
        drawn = {problem.numbers for problem in sample_problems(TaskConfig(), 300, split=split)}
        assert drawn <= set(pictures_of(split))


def test_unknown_split_and_negative_number():
    with pytest.raises(ValueError, match="split='validation'"):
        sample_problems(TaskConfig(), 1, split="validation")
    with pytest.raises(ValueError, match="n=-1"):
        sample_problems(TaskConfig(), -1)


@given(tasks)
@settings(max_examples=50, deadline=None)
def test_worlds_are_as_configured(config):
    world = world_of(config)
    assert set(world.right) == set(world.decoy) == set(world.known) == set(SIGNS[: config.signs])
    assert all(world.right[sign] != world.decoy[sign] for sign in world.right)
    assert abs(sum(world.known.values()) - config.known * config.signs) <= 0.5
    assert world_of(replace(config, gates=1, filler=0)) == world


def test_worlds_differ():
    assert world_of(TaskConfig(world=0)) != world_of(TaskConfig(world=1))


def test_data_sets():
    with_pictures, as_text = (
        make_problems(TaskConfig(), 4, seed=2),
        make_problems(TaskConfig(pictures=False), 4, seed=2),
    )
    assert with_pictures.column_names == ["images", "problem", "answer"]
    assert as_text.column_names == ["problem", "answer"]
    assert with_pictures["answer"] == as_text["answer"]
    for row, text_row, problem in zip(with_pictures, as_text, sample_problems(TaskConfig(), 4, seed=2), strict=True):
        assert row["images"][0].size == (56, 56)
        assert row["problem"] == f"<image>{problem.chain}"
        # The picture as text, and then the same chain.
        numbers = [f"{cell}{number}" for cell, number in zip("ABCD", problem.numbers, strict=True)]
        assert text_row["problem"] == " ".join(numbers) + "\n" + problem.chain
    assert to_task_prompts(with_pictures).column_names == ["images", "answer", "prompt"]
    assert to_task_prompts(as_text)["prompt"][0] == [{"role": "user", "content": as_text["problem"][0]}]


def test_each_number_lies_in_its_own_visual_token():
    def pixels(numbers):
        return torch.tensor(list(draw_cells(numbers, random.Random(0)).convert("L").tobytes())).reshape(56, 56)

    base = pixels((1, 1, 1, 1))
    for cell, (row, column) in enumerate(itertools.product((0, 28), repeat=2)):
        changed = pixels(tuple(8 if i == cell else 1 for i in range(4))) != base
        assert changed[row : row + 28, column : column + 28].sum() == changed.sum() > 0


# ----------------------------------------------------------------------------------------------------------- solutions


def test_solution():
    config = TaskConfig(gates=3, filler=2, filler_choices=1, reveal_delay=1, known=1.0)
    problem = sample_problems(config, 1)[0]
    right = problem.right_cells
    wrong_first = world_of(config).decoy[problem.signs[0]] + right[1:]
    number = dict(zip("ABCD", problem.numbers, strict=True))
    assert write_solution(config, problem, wrong_first, rng=random.Random(0)) == (
        f"a {problem.signs[0]} so so {wrong_first[0]}{number[wrong_first[0]]}\n"
        f"b {problem.signs[1]} so so {right[1]}{number[right[1]]} bad\n"
        f"c {problem.signs[2]} so so {right[2]}{number[right[2]]} ok\n"
        "ok"
    )


@pytest.mark.parametrize("known, confidence", [(0.5, 0.9), (1.0, 0.75), (0.0, 0.8)])
def test_decisions_are_wrong_as_often_as_configured(known, confidence):
    config = TaskConfig(gates=4, known=known, confidence=confidence)
    rng = random.Random(0)
    right = total = 0
    for problem in sample_problems(config, 2000):
        cells = believed_cells(config, problem, rng=rng)
        right += sum(cell == true for cell, true in zip(cells, problem.right_cells, strict=True))
        total += len(cells)
    assert right / total == pytest.approx(known * confidence + (1 - known) * (1 - confidence), abs=0.02)


@given(tasks, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_steps_are_read_as_they_were_written(tokenizer, config, seed):
    rng = random.Random(seed)
    problem = sample_problems(config, 1, seed=seed)[0]
    cells = believed_cells(config, problem, rng=rng)
    solution = write_solution(config, problem, cells, rng=rng)
    read = read_steps(problem, solution)
    assert read.complete and len(read.steps) == config.gates
    assert (
        "".join(step.cell for step in read.steps) == "".join(solution[step.decision] for step in read.steps) == cells
    )
    assert [step.right for step in read.steps] == [a == b for a, b in zip(cells, problem.right_cells, strict=True)]
    assert all(step.read for step in read.steps)
    # Steps are lines, one behind the other.
    lines = solution.splitlines(keepends=True)[config.preamble > 0 :]
    assert [solution[step.start : step.end] for step in read.steps] == lines[: config.gates]
    assert read.correct == (cells == problem.right_cells) == (read.first_error is None)
    assert code_reward([solution], [problem.answer]) == [float(read.correct)]
    if config.reveal_delay is not None:
        assert re.findall(rf"\b(?:{RIGHT}|{WRONG})\b", solution) == [RIGHT if s.right else WRONG for s in read.steps]
    assert len(tokenizer(solution)["input_ids"]) < longest_response(config)


def test_reading_stops_at_the_first_malformed_step():
    config = TaskConfig(gates=3, reveal_delay=None)
    problem = sample_problems(config, 1)[0]
    lines = write_solution(config, problem, problem.right_cells, rng=random.Random(0)).split("\n")
    skipped = read_steps(problem, "\n".join([lines[0], *lines[2:]]))
    assert (len(skipped.steps), skipped.complete, skipped.correct) == (1, False, False)
    other_number = str(problem.number(problem.right_cells[0]) % 9 + 1)
    misread = read_steps(problem, "\n".join([lines[0][:-1] + other_number, *lines[1:]]))
    assert [step.read for step in misread.steps] == [False, True, True]
    assert read_steps(problem, "").steps == ()


def test_only_the_opened_numbers_count():
    rewards = {
        "a bak so B1 ok\nb tun now D2 ok": 1.0,
        "B1 D2": 1.0,  # labels, signs and what is said of decisions are not asked for
        "a bak so A1 bad\nb tun now C2 bad": 1.0,  # nor are names of cells: what counts is what is in them
        "a bak so D2 ok\nb tun now B1 ok": 0.0,
        "a bak so B1 ok\nb tun now D3 bad": 0.0,
        "a bak so B1 ok": 0.0,
        "B1 D2 D2": 0.0,
        "B1 D1 D2": 0.0,
        "12": 0.0,
        "": 0.0,
    }
    assert code_reward(list(rewards), ["12"] * len(rewards)) == list(rewards.values())
    assert code_reward([[{"role": "assistant", "content": "B1 D2"}]], ["12"]) == [1.0]


# ------------------------------------------------------------------------------------------------- tokens and encoding


def test_every_word_is_one_token(tokenizer):
    words = [*SIGNS, *FILLER_WORDS, *CELLS, RIGHT, WRONG]
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for word in words)
    assert len({tokenizer(f" {word}")["input_ids"][0] for word in words}) == len(words)
    assert all(len(tokenizer(label)["input_ids"]) == 1 for label in LABELS)


def test_prompts_have_the_picture_and_nothing_to_spare():
    config = TaskConfig(gates=2)
    processor = build_task_processor(config)
    inputs = encode_prompts(processor, make_problems(config, 3))
    problem = sample_problems(config, 3)[0]
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    assert text == f"<|im_start|>{image}{problem.chain}<|im_end|><|im_start|>"
    assert inputs["pixel_values"].shape[0] == 3 * 16


@pytest.mark.parametrize("pictures", [True, False])
def test_solutions_are_encoded_behind_prompts(pictures):
    config = replace(TEXT_TASK, pictures=pictures)
    processor = build_task_processor(config)
    tokenizer = getattr(processor, "tokenizer", processor)
    problems = sample_problems(config, 2)
    solutions = [write_solution(config, p, p.right_cells, rng=random.Random(0)) for p in problems]
    batch = encode_solutions(processor, config, problems, solutions, rng=random.Random(0))
    for row, solution in enumerate(solutions):
        labels = batch["labels"][row]
        assert tokenizer.decode(labels[labels != IGNORED_LABEL]) == solution + tokenizer.eos_token
        assert (batch["input_ids"][row][labels != IGNORED_LABEL] == labels[labels != IGNORED_LABEL]).all()
    model = build_model(tokenizer, pictures=pictures, size=ModelSize(64, 2))
    assert model(**batch).loss.isfinite()


# ---------------------------------------------------------------------------------------------------------------- cuts


def _encoded(tokenizer, config, n=8):
    problems = sample_problems(config, n)
    rng = random.Random(0)
    solutions = [write_solution(config, p, believed_cells(config, p, rng=rng), rng=rng) for p in problems]
    ids = [tokenizer(solution)["input_ids"] for solution in solutions]
    length = max(map(len, ids))
    mask = torch.tensor([[position < len(row) for position in range(length)] for row in ids])
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in ids])
    return problems, solutions, ids, mask


def test_oracle_cuts_are_where_the_steps_are(tokenizer):
    problems, solutions, ids, mask = _encoded(tokenizer, TaskConfig(gates=4))
    entropies = torch.zeros(mask.shape)
    at_steps = OracleSegmenter()(entropies, mask, ids, tokenizer)
    at_decisions = OracleSegmenter("decisions")(entropies, mask, ids, tokenizer)
    for row, (problem, solution) in enumerate(zip(problems, solutions, strict=True)):
        steps = read_steps(problem, solution).steps
        for segments, ends in (
            (at_steps, [step.end for step in steps]),
            (at_decisions, [step.decision + 1 for step in steps]),
        ):
            pieces = [
                tokenizer.decode(ids[row][segments.ids[row] == index]) for index in range(int(segments.count[row]))
            ]
            assert list(itertools.accumulate(map(len, pieces))) == sorted({*ends, len(solution)})


def test_lines_are_the_steps(tokenizer):
    _, _, ids, mask = _encoded(tokenizer, TaskConfig(gates=4))
    entropies = torch.zeros(mask.shape)
    lines = NewlineSegmenter()(entropies, mask, ids, tokenizer)
    assert torch.equal(lines.ids, OracleSegmenter()(entropies, mask, ids, tokenizer).ids)


def test_unknown_cuts():
    with pytest.raises(ValueError, match="`cuts` must be one of 'steps', 'line_pairs', 'decisions', got 'lines'"):
        OracleSegmenter("lines")


# ---------------------------------------------------------------------------------------------------------- warm start


def test_warm_start_is_cached_and_can_be_evaluated(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = WarmStartConfig(
        task=replace(TEXT_TASK, gates=1), size=ModelSize(64, 2), batch_size=8, cooldown_steps=30, target=0.0
    )
    steps = []
    folder = warm_start(tmp_path, config, on_progress=steps.append)
    assert len(steps) == 30 and steps[-1].loss < steps[0].loss
    assert warm_start(tmp_path, config, on_progress=pytest.fail) == folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    first, again = (evaluate_task(model, tokenizer, config.task, 8) for _ in range(2))
    assert first.responses == again.responses and len(first.correct) == 8
    assert 0.0 <= first.accuracy <= first.interval[1]


def test_a_warm_start_that_does_not_learn_says_so(tmp_path):
    config = WarmStartConfig(task=TEXT_TASK, size=ModelSize(64, 2), batch_size=2, max_steps=0)
    with pytest.raises(RuntimeError, match=r"After 0 steps .*\(target 95.0%\).*raise `max_steps`"):
        warm_start(tmp_path, config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting, value", [("hidden_size", 100), ("layers", 1)])
def test_impossible_sizes(setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` must be .* got {value}"):
        ModelSize(**{setting: value})
