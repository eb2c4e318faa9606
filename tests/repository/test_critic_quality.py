"""The benchmark of critics: values lie where they should, and its statistics are the textbook's."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from sapo_trl import SegmentValueHead, embedded
from sapo_trl.rewards import accuracy_reward


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("critic_lessons", "critic_quality_report", "critic_quality")
LEARNED, HELD_OUT, STATES, CONTINUATIONS = 16, 6, 4, 3


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import critic_lessons
        import critic_quality
        import critic_quality_report

        for name, number in (("HELD_OUT", HELD_OUT), ("STATES", STATES), ("CONTINUATIONS", CONTINUATIONS)):
            patch.setattr(critic_lessons, name, number)
        patch.setattr(critic_quality, "be_quiet_and_small", lambda: None)  # it is for whole processes
        yield critic_lessons, critic_quality, critic_quality_report
        for name in NAMES:
            del sys.modules[name]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory, scripts):
    """A folder with an untrained policy, which is a task's."""
    folder = tmp_path_factory.mktemp("cache")
    processor = embedded.build_processor()
    embedded.build_model(processor.tokenizer).save_pretrained(folder / "policy")
    processor.save_pretrained(folder / "policy")
    lessons = scripts[0]
    task = lessons.Task("Tiny", lambda cache: cache / "policy", lessons.TASKS["embedded"].prompts, accuracy_reward, 12)
    lessons.TASKS["tiny"] = task
    return folder


@pytest.fixture(scope="module")
def lesson(scripts, cache_dir):
    return scripts[0].lesson("tiny", 0, cache_dir, LEARNED)


@pytest.mark.parametrize("mode", ["shared", "shared:reads=3", "ladder", "separate", "adapter"])
def test_a_value_depends_on_the_tokens_before_it_alone(scripts, lesson, mode):
    """Each value equals the critic's last one for a prompt and the response's tokens so far, without any padding."""
    critic = scripts[1].make_critic(mode, lesson.policy(), seed=1, learning_rate=1e-3).value_head
    if mode == "adapter":  # a new one changes nothing
        with torch.no_grad():
            for _, parameter in critic.learned_parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    rows = [2, 0, 5]
    with torch.no_grad():
        values = lesson.values(critic, "held_out", rows)
    batch = lesson.recorded["held_out"]
    assert values.shape == (3, batch["completion_ids"].size(1)) and values.std() > 0
    for place, row in enumerate(rows):
        for position in (0, 1, 4):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            ids = torch.cat([prompt, batch["completion_ids"][row, :position]])[None]
            token_types = batch["mm_token_type_ids"][row][: batch["prompt_ids"].size(1)]
            token_types = torch.nn.functional.pad(token_types[batch["prompt_mask"][row].bool()], (0, position))[None]
            inputs = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": token_types,
                "pixel_values": batch["pixel_values"][row],
                "image_grid_thw": batch["image_grid_thw"][row],
            }
            expected = _last_value(critic, lesson.policy(), inputs)
            torch.testing.assert_close(values[place, position], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def _last_value(critic: SegmentValueHead, policy, inputs) -> torch.Tensor:
    if not critic.reads:
        return critic(**inputs)[0, -1]
    states = policy.base_model(**inputs, output_hidden_states=True).hidden_states
    taken = [critic.take(index, states[depth]) for index, depth in enumerate(critic.depths(policy))]
    return critic.values_of(taken)[0, -1]


def test_remarks_are_truthful_and_move_states_with_their_tokens(scripts):
    processor = embedded.build_processor()
    tokenizer = processor.tokenizer
    texts = ["AB=7\n7-3=5\n5+12=17\n\\boxed{17}", "AB=7\n7-7=0"]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    segment_ids = torch.where(mask.bool(), torch.arange(ids.size(1)) // 2, -1)
    part = {
        "prompt_ids": torch.zeros(2, 3, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": mask,
        "segment_ids": segment_ids,
        "mm_token_type_ids": torch.nn.functional.pad(torch.tensor([[0, 1, 1]] * 2), (0, ids.size(1))),
    }
    states = mask.bool() & (torch.arange(ids.size(1)) % 3 == 0)
    changed = scripts[0].with_remarks({"learned": part, "held_out": part, "states": states}, processor)
    new = changed["learned"]
    kept = [row[keep.bool()] for row, keep in zip(new["completion_ids"], new["completion_mask"], strict=True)]
    # The second response ends with its sum, so no remark follows.
    assert tokenizer.batch_decode(kept) == ["AB=7\n7-3=5?\n5+12=17!\n\\boxed{17}", "AB=7\n7-7=0"]
    assert torch.equal(new["segment_ids"] >= 0, new["completion_mask"].bool())
    assert new["mm_token_type_ids"].shape[1] == 3 + new["completion_ids"].size(1)
    assert torch.equal(changed["states"].sum(1), states.sum(1))
    assert torch.equal(new["completion_ids"][changed["states"]], ids[states])
    assert torch.equal(new["segment_ids"][changed["states"]], segment_ids[states])
    # A remark belongs to the segment of the sum before it.
    marks = torch.isin(new["completion_ids"], torch.tensor(tokenizer.convert_tokens_to_ids(["!", "?"])))
    assert marks.sum() == 2 and not (marks & changed["states"]).any()
    assert torch.equal(new["segment_ids"][marks], new["segment_ids"][:, :-1][marks[:, 1:]])


def test_a_longer_run_begins_with_the_shorter_one(scripts, cache_dir):
    """So a rate that was chosen for both needs one run only. Another seed learns from other responses."""
    one, two, other = (
        scripts[1].run("tiny", LEARNED, seed, "ladder", 1e-2, passes=passes, cache_dir=cache_dir)["measured"]
        for seed, passes in ((0, 1), (0, 2), (1, 1))
    )
    assert len(one) == 1 and len(two) == 2
    assert one[0] == pytest.approx(two[0], nan_ok=True)
    assert two[0]["squared_error"] != two[1]["squared_error"]
    assert one[0]["squared_error"] != other[0]["squared_error"]


def test_measures_and_limits_by_the_law_of_total_variance(scripts, lesson):
    """Outcomes of known probabilities. The error of the true values is 0, the error of a constant their variance."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(4000, generator=generator)
    outcomes = (torch.rand(4000, 5, generator=generator) < chances[:, None]).float()
    known = object.__new__(scripts[0].Lesson)
    batch = {"segment_ids": torch.arange(4000)[None], "rewards": torch.zeros(1)}
    known.recorded = {
        "outcomes": outcomes,
        "states": torch.ones(1, 4000, dtype=torch.bool),
        "held_out": batch,
        "learned": {"rewards": torch.tensor([1.0, 0.0, 0.0, 0.0])},
    }
    limit = known.limit()
    # Of uniform chances the variance is 1/12, and that of an outcome 1/4.
    assert limit["explained_variance"] == pytest.approx((1 / 12) / (1 / 4), abs=0.02)
    assert limit["squared_error"] == pytest.approx(1 / 12, abs=0.004)
    assert limit["accuracy"] == 0.25
    for values, error in ((chances, 0.0), (torch.full((4000,), 0.5), 1 / 12)):
        known.values = lambda critic, part, rows, values=values: values[None]
        assert known.test(None)["squared_error"] == pytest.approx(error, abs=0.004)


def _written(report, path):
    """A file of results in which the best rate of `ladder` is another one after two passes."""
    rng, rows, common = np.random.default_rng(0), [], {"task": "demo", "responses": report.LEARNED}
    for critic in ("ladder", "separate"):
        for seed in (*report.TUNING_SEEDS, *report.SEEDS):
            for rate in report.LEARNING_RATES:
                level = [rate, 1 - rate] if critic == "ladder" else [rate, rate]
                noise = rng.normal(size=2) / 1e4
                measured = [
                    {"explained_variance": x + y, "squared_error": 0.02 - x / 100 + y}
                    for x, y in zip(level, noise, strict=True)
                ]
                row = {**common, "critic": critic, "seed": seed, "learning_rate": rate, "measured": measured}
                rows.append({**row, "parameters": 1234})
    for seed in report.SEEDS:
        row = {"explained_variance": 0.5 + seed / 100, "squared_error": 0.03, "accuracy": 0.25}
        rows.append({**common, "limit": True, "seed": seed, **row})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_the_report_has_the_tuned_rates_and_students_intervals(scripts, tmp_path):
    _, quality, report = scripts
    rows = _written(report, tmp_path / "critic_quality.jsonl")
    assert quality.main(["report", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "critic_quality.md").read_text()
    lowest, highest = min(report.LEARNING_RATES), max(report.LEARNING_RATES)

    def scores(critic, rate, passes):
        found = [row for row in rows if row.get("critic") == critic and row["learning_rate"] == rate]
        return np.array([r["measured"][passes]["explained_variance"] for r in found if r["seed"] in report.SEEDS])

    for passes, rate in ((0, highest), (1, lowest)):
        own, other = scores("ladder", rate, passes), scores("separate", highest, passes)
        line = next(row for row in table.splitlines() if f"| {passes + 1} | {rate:g} |" in row)
        for sample in (own, own - other):
            low, high = stats.t.interval(0.95, len(sample) - 1, sample.mean(), stats.sem(sample))
            assert f"| {sample.mean():.3f} ({low:.3f} to {high:.3f}) |" in line
    assert "| true values | | | | 0.525 (" in table and "right in 25.0% of its responses" in table
    assert (tmp_path / "critic_quality.png").stat().st_size > 10_000


def test_the_page_has_the_table_of_the_recorded_runs(scripts):
    recorded = BENCHMARKS / "results" / "critic_quality" / "critic_quality.jsonl"
    results = scripts[2].Results(recorded)
    table = scripts[2].as_markdown(results)
    compared = {row["task"] for row in results.of(limit=True)}
    assert len(compared) >= 2 and table.count("| true values |") == len(compared)
    assert table.strip() in (BENCHMARKS.parent / "docs" / "critics.md").read_text()


def test_finished_runs_are_not_repeated(scripts, tmp_path, monkeypatch):
    _, quality, report = scripts
    path = tmp_path / "critic_quality.jsonl"
    _written(report, path)
    before = path.read_text()
    monkeypatch.setattr(quality, "run", lambda *args, **kwargs: pytest.fail("a finished run was repeated"))
    for command in ("tune", "compare"):
        arguments = [command, "--task", "demo", "--critics", "ladder", "separate", "--out", str(tmp_path)]
        assert quality.main(arguments) == 0
    assert path.read_text() == before
