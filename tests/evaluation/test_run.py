"""Runs of `sapo-trl eval`: what is asked, kept, resumed and refused."""

import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageFile
from rich.console import Console

from sapo_trl.cli.train import TrainArguments, load_prompts
from sapo_trl.embedded import build_model, make_problems
from sapo_trl.evaluation.backends import generation_seed
from sapo_trl.evaluation.benchmark import Problem, Score
from sapo_trl.evaluation.benchmarks import BENCHMARKS
from sapo_trl.evaluation.command import main
from sapo_trl.evaluation.progress import Steps
from sapo_trl.evaluation.rows import load_rows
from sapo_trl.evaluation.settings import EvalArguments, chosen_benchmarks
from sapo_trl.evaluation.store import GENERATIONS, MERGE_AT, GenerationStore, PartFiles
from tests.evaluation.evaluation_run import DRAWN, TEXT, TOYS
from tests.test_folder_lock import holder


ROOT = Path(__file__).parents[2]
# A PNG of 60,000 by 60,000 pixels, by its header.
BOMB = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
BOMB += struct.pack(">I", zlib.crc32(BOMB[12:]))


@pytest.fixture(scope="module")
def model_folder(qwen2_5_vl_processor, tmp_path_factory):
    """The embedded task's model with random weights: it reads pictures and writes nonsense."""
    folder = tmp_path_factory.mktemp("model")
    build_model(qwen2_5_vl_processor.tokenizer).save_pretrained(folder)
    qwen2_5_vl_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    make_problems(11, split="test").to_parquet(folder / "drawn.parquet")
    questions = [{"name": f"q{i}", "question": f"{i} + 1?", "answer": str(i + 1)} for i in range(6)]
    Dataset.from_list(questions).to_json(folder / "text.jsonl")
    return folder


def command(model_folder, rows, output_dir, **settings):
    settings = {"n": 2, "max_new_tokens": 8, "batch_size": 2, "seed": 5, **settings}
    benchmarks = f"drawn={rows / 'drawn.parquet'},text={rows / 'text.jsonl'}"
    arguments = ["--model", str(model_folder), "--benchmarks", benchmarks, "--output_dir", str(output_dir)]
    return arguments + [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def evaluate(*arguments, **settings):
    printed = io.StringIO()
    code = main(command(*arguments, **settings), TOYS, Console(file=printed, width=140))
    return code, printed.getvalue()


def generations(folder):
    frame = pd.read_parquet(folder / "generations")
    return frame.sort_values(["benchmark", "row", "generation"], ignore_index=True)


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "`model` is not set"),
        ({"backend": "transfomers"}, "`backend` .* got 'transfomers'. Did you mean `transformers`?"),
        ({"top_p": 0.0}, r"`top_p` must lie in \(0, 1\], got 0.0"),
        ({"temperature": -0.1}, "`temperature` must be at least 0, got -0.1"),
        ({"n": 0}, "`n` must be at least 1, got 0"),
        ({"judge_url": "http://x"}, "`judge_model` is not"),
        ({"judge_url": "file:///etc/passwd", "judge_model": "m"}, "must start with http"),
        ({"min_pixels": 500, "max_pixels": 400}, r"`min_pixels` \(500\) must not exceed `max_pixels` \(400\)"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        EvalArguments(**{"model": "m", **settings})


def test_benchmarks_are_chosen_by_name_and_path(tmp_path):
    assert EvalArguments(model="m", benchmarks=["a,b", "c"]).benchmarks == ["a", "b", "c"]
    assert chosen_benchmarks(["drawn", f"text={tmp_path}"], TOYS) == {"drawn": None, "text": str(tmp_path)}
    with pytest.raises(ValueError, match="'drwan' is none of drawn, text. Did you mean `drawn`?"):
        chosen_benchmarks(["drwan"], TOYS)
    with pytest.raises(ValueError, match="'drawn' occurs twice"):
        chosen_benchmarks(["drawn", "drawn"], TOYS)
    with pytest.raises(ValueError, match="names the path '/none/there'"):
        chosen_benchmarks(["drawn=/none/there"], TOYS)
    with pytest.raises(ValueError, match="`benchmarks` is empty"):
        chosen_benchmarks([], TOYS)


def test_settings_from_yaml_and_unknown_ones(tmp_path, capsys):
    config = tmp_path / "eval.yaml"
    config.write_text("model: nowhere\nbenchmarks: [drwan]\n")
    assert main(["--config", str(config)], TOYS) == 2
    assert "'drwan' is none of" in capsys.readouterr().err
    config.write_text("model: nowhere\nbenchmarks: [drawn]\ntemprature: 1\n")
    assert main(["--config", str(config)], TOYS) == 2
    assert "temprature" in capsys.readouterr().err


def test_a_run_folder_is_named_after_the_model(tmp_path):
    assert EvalArguments(model="Qwen/Qwen2.5-VL-3B-Instruct").run_folder == Path("outputs/eval-Qwen2.5-VL-3B-Instruct")
    assert EvalArguments(model="a/b", output_dir=str(tmp_path)).run_folder == tmp_path


# ---------------------------------------------------------------------------------------------------------------- rows


def test_rows_that_belong_and_the_limit(rows):
    odd = replace(TEXT, keep=lambda row: int(row["answer"]) % 2 == 1)
    found = load_rows(odd, str(rows / "text.jsonl"), limit=2)
    assert (found.numbers, found.belonging) == ([0, 2], 3)
    assert found.problem(2).id == "q2"
    with pytest.raises(ValueError, match="none of the 6 rows of .* belongs"):
        load_rows(replace(TEXT, keep=lambda row: False), str(rows / "text.jsonl"))


def test_a_folder_with_splits(rows, tmp_path):
    make_problems(2).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"has no split 'test'; it has \['train'\]"):
        load_rows(DRAWN, str(tmp_path))
    make_problems(3, split="test").to_parquet(tmp_path / "test.parquet")
    assert load_rows(DRAWN, str(tmp_path)).numbers == [0, 1, 2]
    assert load_rows(replace(DRAWN, split="test+train"), str(tmp_path)).numbers == [0, 1, 2, 3, 4]


def test_the_fingerprint_is_of_the_content(rows, tmp_path):
    original = load_rows(DRAWN, str(rows / "drawn.parquet"))
    (tmp_path / "copy.parquet").write_bytes((rows / "drawn.parquet").read_bytes())
    assert load_rows(DRAWN, str(tmp_path / "copy.parquet")).fingerprint == original.fingerprint
    make_problems(11, split="test", seed=1).to_parquet(tmp_path / "other.parquet")
    assert load_rows(DRAWN, str(tmp_path / "other.parquet")).fingerprint != original.fingerprint
    assert load_rows(DRAWN, str(rows / "drawn.parquet"), limit=10).fingerprint != original.fingerprint


def test_a_row_that_is_no_problem_is_named(tmp_path):
    Dataset.from_list([{"name": "a", "question": "?", "answer": "1"}, {"name": "b", "answer": "1"}]).to_json(
        tmp_path / "rows.jsonl"
    )
    found = load_rows(replace(TEXT, to_problem=lambda row, number: 1 / number), str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match="text: row 0 of .*ZeroDivisionError"):
        found.problem(0)


def test_a_file_that_nothing_reads(tmp_path):
    (tmp_path / "rows.xlsx").touch()
    with pytest.raises(ValueError, match="ends in '.xlsx'; a file ends in .parquet"):
        load_rows(TEXT, str(tmp_path / "rows.xlsx"))


@pytest.mark.parametrize(
    ("limits", "expected"), [({}, (56, 56)), ({"min_pixels": 12544}, (112, 112)), ({"max_pixels": 800}, (28, 28))]
)
def test_images_are_scaled_as_in_training(rows, limits, expected):
    problem = load_rows(DRAWN, str(rows / "drawn.parquet"), **limits).problem(0)
    assert [image.size for image in problem.images] == [expected]
    path = str(rows / "drawn.parquet")
    trained, _ = load_prompts(TrainArguments(dataset_name=path, dataset_format="geometry3k", **limits), "train")
    assert problem.images[0].tobytes() == trained[0]["images"][0].tobytes()


def test_pictures_beside_a_table_of_text(tmp_path):
    """Paths start where the table lies, as in training; a picture that changes makes other rows."""
    (tmp_path / "pics").mkdir()
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "pics" / "a.PNG")
    row = {"problem": "<image>a.png?", "answer": "2", "images": ["pics/a.PNG"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    found = load_rows(BENCHMARKS["geo3k"], str(tmp_path / "rows.jsonl"))
    (image,) = found.problem(0).images
    assert (image.size, image.getpixel((0, 0))) == ((30, 20), (0, 0, 255))
    Image.new("RGB", (30, 20), "red").save(tmp_path / "pics" / "a.PNG")
    assert load_rows(BENCHMARKS["geo3k"], str(tmp_path / "rows.jsonl")).fingerprint != found.fingerprint
    (tmp_path / "pics" / "a.PNG").unlink()
    with pytest.raises(ValueError, match="`images` in row 0 of geo3k is neither an existing image file nor"):
        found.problem(0)


def test_a_folder_of_pictures(tmp_path):
    (tmp_path / "test").mkdir()
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "test" / "a.png")
    row = {"file_name": "a.png", "question": "What colour is " + "very " * 200 + "a.png", "answer": "C"}
    (tmp_path / "test" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    problem = load_rows(BENCHMARKS["logicvista"], str(tmp_path)).problem(0)
    assert (problem.answer, problem.images[0].getpixel((0, 0))) == ("C", (0, 0, 255))


@pytest.mark.parametrize("hostile", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", BOMB])
def test_hostile_pictures_are_named_and_never_decoded(hostile, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    rows = [{"images": [{"bytes": hostile, "path": None}], "problem": "<image>?", "answer": "1"}]
    features = Features({"images": List(ImageFeature()), "problem": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    found = load_rows(BENCHMARKS["geo3k"], str(tmp_path / "rows.parquet"))
    with pytest.raises(ValueError, match=r"geo3k: row 0 .*(unreadable|huge) image"):
        found.problem(0)


# --------------------------------------------------------------------------------------------------------------- store


def row(number, generation=0):
    return {
        "row": number,
        "id": f"p{number}",
        "generation": generation,
        "seed": 1,
        "text": f"text {number}",
        "tokens": 3,
        "finish_reason": "stop",
    }


def problem(number):
    image = Image.new("RGB", (900, 300), "white")
    return Problem(f"p{number}", [{"role": "user", "content": "?"}], "1", [image], {"a": [1, None]})


def test_what_is_stored_comes_back(tmp_path):
    store = GenerationStore(tmp_path)
    store.add("toy", [(1, problem(1))], [row(1, 1)])
    store.add("toy", [(0, problem(0)), (1, problem(1))], [row(0), row(1, 0)])
    again = GenerationStore(tmp_path)
    assert again.done == {("toy", 1, 1), ("toy", 0, 0), ("toy", 1, 0)}
    assert [(r["row"], r["generation"]) for r in again.generations()] == [(0, 0), (1, 0), (1, 1)]
    stored = again.problems()
    assert [entry["id"] for entry in stored] == ["p0", "p1"]
    with Image.open(io.BytesIO(stored[0]["thumbnails"][0])) as thumbnail:
        assert thumbnail.size == (384, 128)


def test_two_rows_with_one_id_are_refused(tmp_path):
    store = GenerationStore(tmp_path)
    twin = replace(problem(1), id="p0")
    with pytest.raises(ValueError, match="toy: rows 0 and 1 have the same id 'p0'"):
        store.add("toy", [(0, problem(0)), (1, twin)], [])
    store.add("toy", [(0, problem(0))], [row(0)])
    with pytest.raises(ValueError, match="rows 0 and 1"):
        GenerationStore(tmp_path).add("toy", [(1, twin)], [row(1)])
    store.add("another", [(1, twin)], [])  # of another benchmark it may have any


def test_many_parts_become_one_file_and_nothing_is_lost(tmp_path):
    files = PartFiles(tmp_path, GENERATIONS)
    for number in range(MERGE_AT + 2):
        files.append([{"benchmark": "toy", **row(number)}])
    names = [f"part-000000-0000{MERGE_AT - 1}.parquet"]
    names += [f"part-0000{number}-0000{number}.parquet" for number in (MERGE_AT, MERGE_AT + 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for number in range(MERGE_AT + 2, 2 * MERGE_AT):
        files.append([{"benchmark": "toy", **row(number)}])
    assert len(list(tmp_path.iterdir())) == 2
    assert files.table()["row"].to_pylist() == list(range(2 * MERGE_AT))
    files.merge()
    assert len(list(tmp_path.iterdir())) == 1
    assert files.table()["row"].to_pylist() == list(range(2 * MERGE_AT))


def test_what_a_kill_leaves_between_two_steps_does_not_count(tmp_path):
    files = PartFiles(tmp_path, GENERATIONS)
    for number in range(3):
        files.append([{"benchmark": "toy", **row(number)}])
    parts = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    files.merge()
    # Killed after the merged file had its name and before its parts were removed, and while another was written.
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".part-000003-000003.parquet.17").write_bytes(b"PAR1 and no more")
    assert files.table()["row"].to_pylist() == [0, 1, 2]
    files.append([{"benchmark": "toy", **row(3)}])
    files.tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "part-000000-000002.parquet",
        "part-000003-000003.parquet",
    ]
    assert files.table()["row"].to_pylist() == [0, 1, 2, 3]


def test_seeds_are_of_the_sample_alone():
    keys = [(0, "a", "p", 0), (1, "a", "p", 0), (0, "b", "p", 0), (0, "a", "q", 0), (0, "a", "p", 1)]
    seeds = [generation_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert generation_seed(*keys[0]) == seeds[0]


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(model_folder, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "finished"
    code, printed = evaluate(model_folder, rows, folder)
    assert code == 0, printed
    return folder, printed


def test_a_run_keeps_everything(finished, model_folder):
    folder, printed = finished
    found = generations(folder)
    expected = {("drawn", f"drawn-{i}", g) for i in range(11) for g in range(2)}
    expected |= {("text", f"q{i}", g) for i in range(6) for g in range(2)}
    assert set(zip(found["benchmark"], found["id"], found["generation"], strict=True)) == expected
    assert len(found) == len(expected)
    assert found["tokens"].between(1, 8).all()
    assert (found["finish_reason"] == "length").any()

    scores = pd.read_parquet(folder / "scores.parquet")
    assert len(scores) == len(expected) and set(scores["scorer"]) == {"rules"}
    record = json.loads((folder / "eval.json").read_text())
    assert record["settings"]["seed"] == 5 and record["settings"]["model"] == str(model_folder)
    assert record["benchmarks"]["drawn"]["belonging"] == 11
    assert record["environments"][0]["torch"]
    results = json.loads((folder / "results.json").read_text())["benchmarks"]
    assert set(results) == {"drawn", "text"}
    assert results["drawn"]["groups"] == 6 and results["drawn"]["problems"] == 11
    assert set(results["text"]["repeated"]) == {"avg@2", "pass@1", "pass@2"}
    assert "Drawn" in printed and "Generating: 34 of 34" in printed
    for name in ("table.md", "table.tex", "table.json", "answers.html"):
        assert (folder / name).stat().st_size > 0


def test_generations_do_not_depend_on_their_batches(finished, model_folder, rows, tmp_path):
    code, printed = evaluate(model_folder, rows, tmp_path, batch_size=7)
    assert code == 0, printed
    one, other = generations(finished[0]), generations(tmp_path)
    pd.testing.assert_frame_equal(one, other)
    # And they do depend on the seed, within a problem too.
    assert (one.groupby(["benchmark", "id"])["text"].nunique() == 2).mean() > 0.9


def test_a_finished_run_needs_no_model(finished, model_folder, rows, tmp_path, monkeypatch):
    folder, _ = finished
    before = {path: path.read_bytes() for path in (folder / "generations").iterdir()}

    def refuse(arguments):
        raise AssertionError("loaded a model")

    monkeypatch.setattr("sapo_trl.evaluation.run.make_backend", refuse)
    code, printed = evaluate(model_folder, rows, folder)
    assert code == 0 and "all 34 exist already" in printed
    assert {path: path.read_bytes() for path in (folder / "generations").iterdir()} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 1.0}, "holds a run with temperature=0.6, not 1.0"),
        ({"seed": 6}, "holds a run with seed=5, not 6"),
        ({"n": 3}, "holds a run with n=2, not 3"),
    ],
)
def test_a_folder_of_other_settings_is_refused(finished, model_folder, rows, settings, message, capsys):
    code, _ = evaluate(model_folder, rows, finished[0], **settings)
    assert code == 2
    assert message in capsys.readouterr().err


def test_other_rows_or_weights_under_the_same_names_are_refused(finished, rows, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    record = json.loads((finished[0] / "eval.json").read_text())
    model = record["settings"]["model"]
    (folder / "eval.json").write_text(json.dumps(record))
    make_problems(11, split="test", seed=3).to_parquet(tmp_path / "drawn.parquet")
    (tmp_path / "text.jsonl").write_bytes((rows / "text.jsonl").read_bytes())
    assert evaluate(model, tmp_path, folder)[0] == 2
    assert "on other rows of 'drawn'" in capsys.readouterr().err
    record["weights"]["model"] = "0" * 32
    (folder / "eval.json").write_text(json.dumps(record))
    assert evaluate(model, rows, folder)[0] == 2
    assert "other weights under the same `model`" in capsys.readouterr().err


def test_scores_can_be_made_again_from_what_is_stored(finished):
    folder = finished[0]
    before = json.loads((folder / "results.json").read_text())["benchmarks"]["text"]["metrics"]
    generous = {**TOYS, "text": replace(TEXT, score=lambda problem, text: Score(1.0, "anything"))}
    arguments = ["--output_dir", str(folder), "--score_only"]
    assert main(arguments, generous, Console(file=io.StringIO())) == 0
    after = json.loads((folder / "results.json").read_text())["benchmarks"]
    accuracy = after["text"]["metrics"]["accuracy"]
    assert (accuracy["value"], accuracy["high"]) == (1.0, 1.0) and 0 < accuracy["low"] < 1
    assert main(arguments, TOYS, Console(file=io.StringIO())) == 0
    assert json.loads((folder / "results.json").read_text())["benchmarks"]["text"]["metrics"] == before


def test_a_scorer_that_fails_is_counted_and_costs_no_other_its_score(finished):
    def fails_sometimes(problem, text):
        if problem.id == "q1":
            raise RecursionError("too deep")
        return Score(1.0, "1")

    folder = finished[0]
    arguments = ["--model", "gone", "--output_dir", str(folder), "--score_only"]
    printed = io.StringIO()
    assert main(arguments, {**TOYS, "text": replace(TEXT, score=fails_sometimes)}, Console(file=printed)) == 0
    entry = json.loads((folder / "results.json").read_text())["benchmarks"]["text"]
    assert entry["errors"] == 2
    assert entry["metrics"]["accuracy"]["value"] == pytest.approx(5 / 6)
    assert "2 answers could not be scored" in " ".join(printed.getvalue().split())
    assert main(arguments, TOYS, Console(file=io.StringIO())) == 0


def test_score_only_needs_a_run(tmp_path, capsys):
    assert main(["--model", "m", "--output_dir", str(tmp_path), "--score_only"], TOYS) == 2
    assert "has no eval.json" in capsys.readouterr().err


def broken(folder, name, content):
    """The finished run, but for one file."""
    path = folder / name
    if isinstance(content, dict):
        pd.DataFrame(content).to_parquet(path)
    else:
        path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("eval.json", "{", "not JSON"),
        ("eval.json", "[]", "the content must be an object"),
        ("eval.json", '{"model_name": "m", "settings": {}}', "`settings.model` is missing"),
        ("generations/part-000000-000000.parquet", "cut", "or damaged"),
        ("generations/part-000000-000000.parquet", {"benchmark": ["text"]}, "not a file of this version"),
        (
            "problems/part-000000-000000.parquet",
            {"benchmark": [3], "row": ["x"], "id": [1]},
            "not a file of this version",
        ),
    ],
)
def test_an_old_or_broken_file_is_named(finished, model_folder, rows, tmp_path, capsys, name, content, message):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    for path in (folder / name).parent.glob("*.parquet"):
        path.unlink()
    path = broken(folder, name, content)
    for run in (
        lambda: main(["--output_dir", str(folder), "--score_only"], TOYS, Console(file=io.StringIO())),
        lambda: evaluate(model_folder, rows, folder)[0],
    ):
        assert run() == 2
        error = capsys.readouterr().err
        assert f"{path}: " in error and message in error and error.count("\n") == 1


def test_generations_without_their_problem_and_problems_without_json(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    (path,) = (folder / "problems").glob("*.parquet")
    problems = pd.read_parquet(path)
    arguments = ["--output_dir", str(folder), "--score_only"]
    problems.assign(prompt="{").to_parquet(path)
    assert main(arguments, TOYS, Console(file=io.StringIO())) == 2
    assert "problems: drawn 'drawn-0' has no JSON" in capsys.readouterr().err
    problems[problems["id"] != "q3"].to_parquet(path)
    assert main(arguments, TOYS, Console(file=io.StringIO())) == 2
    assert "has generations of text 'q3', but its folder `problems` lacks the problem" in capsys.readouterr().err


def test_only_its_own_leftovers_are_removed(finished, tmp_path):
    """A folder of someone else's may be a link to a place with files that matter."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text("mine")
    (home / ".part-000000-000000.parquet.123").write_text("left by a process that was killed")
    PartFiles(home, GENERATIONS).tidy()
    assert [path.name for path in home.iterdir()] == [".bashrc"]


def test_an_incomplete_benchmark_says_so(model_folder, rows, tmp_path):
    code, _ = evaluate(model_folder, rows, tmp_path, limit=4)
    assert code == 0
    text = (tmp_path / "table.md").read_text()
    assert "† " in text and "4 of 11 problems" in text


@pytest.mark.slow
def test_killed_again_and_again_no_sample_is_lost_or_repeated(finished, model_folder, rows, tmp_path):
    """SIGKILL at three random moments; at last the folder holds what a run that nobody disturbed holds."""
    rng = random.Random(1)
    left = []
    for _ in range(3):
        process = start_run(command(model_folder, rows, tmp_path))
        wanted = batches_in(tmp_path) + rng.randint(1, 3)
        while process.poll() is None and batches_in(tmp_path) < wanted:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        printed = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, printed[-3000:]
        left.append(PartFiles(tmp_path / "generations", GENERATIONS).table().num_rows)
    assert 0 < left[0] < left[1] < left[2] < 34
    process = start_run(command(model_folder, rows, tmp_path))
    printed = process.communicate()[0]
    assert process.returncode == 0, printed[-3000:]
    found = generations(tmp_path)
    assert not found.duplicated(["benchmark", "id", "generation"]).any()
    pd.testing.assert_frame_equal(found, generations(finished[0]))
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, finished[0]))
    assert one["benchmarks"] == other["benchmarks"]


def start_run(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.evaluation.evaluation_run", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def batches_in(folder: Path) -> int:
    return len(list((folder / "generations").glob("part-*.parquet")))


def test_two_processes_do_not_share_a_folder(finished, model_folder, rows, capsys):
    with holder(finished[0]) as process:
        code, _ = evaluate(model_folder, rows, finished[0])
    assert code == 2
    assert f"is in use: process {process.pid} on " in capsys.readouterr().err


def test_progress_in_lines():
    printed = io.StringIO()
    with Steps(Console(file=printed), "Generating", 10, done=4) as steps:
        steps.last_line -= 60  # as if the last line were a minute old
        steps.started -= 60
        steps.advance(3)
        steps.advance(3)
    lines = printed.getvalue().splitlines()
    assert lines == ["Generating: 7 of 10, 60 s, about 60 s left", "Generating: 10 of 10, 60 s"]
