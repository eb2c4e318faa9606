"""`sapo-trl eval --config run.yaml`: a run's model on its own test split, prompts and reward functions."""

import io
import json

import pandas as pd
import pytest
import yaml
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText

from sapo_trl.embedded import build_model, build_tokenizer, load_processor, make_problems
from sapo_trl.embedded.evaluation import evaluate as greedy
from sapo_trl.evaluation.backends import Request, texts_to_continue
from sapo_trl.evaluation.backends.transformers import TransformersBackend
from sapo_trl.evaluation.command import _parse, main
from sapo_trl.evaluation.own_task import read_run_file
from sapo_trl.evaluation.results import RESULTS_NAME


def run(*arguments):
    """The exit code of `sapo-trl eval` and its output."""
    printed = io.StringIO()
    return main(list(map(str, arguments)), None, Console(file=printed, width=140)), printed.getvalue()


def results(folder):
    return json.loads((folder / RESULTS_NAME).read_text())["benchmarks"]["task"]


def metrics(folder):
    return {name: interval["value"] for name, interval in results(folder)["metrics"].items()}


def brevity(completions, tag, log_metric, **kwargs):
    """A reward with a column of the data: 0.5 for rows that are tagged, else None."""
    log_metric("brevity", 1.0)
    assert completions and all(completion[0]["role"] == "assistant" for completion in completions)
    return [0.5 if each == "even" else None for each in tag]


async def patience(completions, **kwargs):
    return [1.0] * len(completions)


def token_count(completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


@pytest.fixture(scope="module")
def untrained(qwen2_5_vl_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "my-run"
    build_model(qwen2_5_vl_processor.tokenizer).save_pretrained(folder)
    qwen2_5_vl_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def own_data(untrained, tmp_path):
    """Rows of JSON with pictures beside them, and a run file with a model in its folder."""
    (tmp_path / "pics").mkdir()
    rows = []
    for number in range(6):
        Image.new("RGB", (56, 56), (40 * number, 0, 0)).save(tmp_path / "pics" / f"{number}.png")
        tag = "odd" if number % 2 else "even"
        rows.append({"q": f"<image>How red {number}?", "gold": number, "picture": f"pics/{number}.png", "tag": tag})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": "embedded",
        "output_dir": str(untrained),
        "dataset_name": str(tmp_path / "test.jsonl"),
        "columns": {"problem": "q", "answer": "gold", "images": "picture"},
        "dataset_test_split": "train",
        "prompt_template": "Look. {problem} Now.",
        "reward_funcs": ["accuracy_reward", f"{__name__}.brevity", f"{__name__}.patience", f"{__name__}.token_count"],
        "reward_weights": [2.0, 1.0, 0.5, 1.0],
        "max_completion_length": 5,
        "bf16": True,  # a file for a GPU
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file, settings


@pytest.mark.slow
def test_a_trained_model_keeps_its_accuracy(warm_folder, tmp_path):
    """The greedy accuracy of another loop, on the same problems with the same prompts."""
    number = 96
    rows = make_problems(512, split="test").select(range(number))
    model = AutoModelForImageTextToText.from_pretrained(warm_folder)
    expected = greedy(model, load_processor(warm_folder), rows, temperature=0.0)
    code, printed = run(
        *["--config", "embedded", "--model", warm_folder, "--output_dir", tmp_path / "run"],
        *["--temperature", "0", "--limit", number],
    )
    assert code == 0, printed
    texts = pd.read_parquet(tmp_path / "run" / "generations").sort_values("row")["text"]
    assert list(texts) == expected.completions
    assert expected.accuracy > 0
    found = metrics(tmp_path / "run")
    assert found == {"reward": expected.accuracy, "rewards/accuracy_reward/mean": expected.accuracy}


def test_own_rows_prompts_and_rewards(own_data, untrained, tmp_path):
    file, _ = own_data
    folder = tmp_path / "out"
    code, printed = run("--config", file, "--output_dir", folder, "--n", 2)
    assert code == 0, printed
    record = json.loads((folder / "eval.json").read_text())
    assert record["model_name"] == untrained.name and record["settings"]["max_new_tokens"] == 5
    problems = pd.read_parquet(folder / "problems").sort_values("row")
    prompts = [json.loads(prompt) for prompt in problems["prompt"]]
    assert prompts[3] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look. "},
                {"type": "image"},
                {"type": "text", "text": "How red 3? Now."},
            ],
        }
    ]
    assert list(problems["answer"]) == [str(number) for number in range(6)]
    # Nonsense is wrong. Half of the rows have no reward of `brevity`; `token_count` needs tokens.
    assert metrics(folder) == {
        "reward": pytest.approx(0.5 + 0.5 / 2),
        "rewards/accuracy_reward/mean": 0.0,
        "rewards/brevity/mean": 0.5,
        "rewards/patience/mean": 1.0,
    }
    note = results(folder)["scoring_note"]
    assert "Left out: token_count" in note and "rewards/patience/mean 100.00" in printed.replace("\n", " ")
    assert "answers could not be scored" not in printed


def test_scores_again_and_the_run_file_is_asked_for(own_data, tmp_path, capsys):
    file, settings = own_data
    folder = tmp_path / "out"
    assert run("--config", file, "--output_dir", folder, "--limit", 2)[0] == 0
    settings |= {"reward_funcs": [f"{__name__}.patience"], "reward_weights": None}
    file.write_text(yaml.safe_dump(settings))
    assert run("--config", file, "--output_dir", folder, "--score_only", "true")[0] == 0
    assert metrics(folder) == {"reward": 1.0, "rewards/patience/mean": 1.0}
    capsys.readouterr()
    assert run("--output_dir", folder, "--score_only", "true")[0] == 2
    assert "Name the run file of `task` with `--config`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"output_dir": "nowhere"}, [], "`model` is not set"),
        ({"benchmarks": ["task"]}, [], "has settings of `sapo-trl train` .* and of `sapo-trl eval` (benchmarks)"),
        ({}, ["--dataset_test_split", "test"], "has no split 'test'"),
        ({"reward_funcs": ["no_module.here"], "reward_weights": None}, [], "No module named 'no_module'"),
        ({}, ["--num_processes", "2"], "takes no options of `accelerate launch`"),
        ({}, ["--dataset_tset_split", "train"], "Did you mean `dataset_test_split`"),
        ({}, ["--judge_url", "http://x", "--judge_model", "m"], "neither `harness: lmms-eval` nor `judge_url`"),
        ({"reward_funcs": ["accuracy"], "reward_weights": None}, [], "reward_funcs='accuracy' is neither"),
        ({"reward_funcs": [f"{__name__}.token_count"], "reward_weights": None}, [], "token_count cannot be called"),
        ({"columns": {"problem": "q", "answer": "gold", "images": "picture", "extra": "x"}}, [], "extra"),
    ],
)
def test_what_cannot_be(changes, arguments, message, own_data, tmp_path, capsys):
    file, settings = own_data
    file.write_text(yaml.safe_dump(settings | changes))
    try:
        code, _ = run("--config", file, "--output_dir", tmp_path / "out", *arguments)
    except SystemExit as stop:
        code = stop.code
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert code == 2 and line.startswith("sapo-trl eval: error: ")
    for part in message.split(" .* "):
        assert part in line


def test_an_adapter_goes_on_the_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    file = tmp_path / "run.yaml"
    file.write_text(f"model_name_or_path: Qwen/Qwen2.5-VL-3B-Instruct\noutput_dir: {tmp_path}\nmodel_revision: abc\n")
    defaults, _ = read_run_file(str(file), [])
    expected = {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "adapter": str(tmp_path), "revision": "abc"}
    assert {name: defaults[name] for name in expected} == expected
    # Another model comes without the run's adapter.
    arguments, _ = _parse(["--config", str(file), "--model", "embedded"])
    assert (arguments.model, arguments.adapter, arguments.revision) == ("embedded", None, None)
    arguments, task = _parse(["--config", str(file), "--n", "3"])
    assert (arguments.model, arguments.adapter, arguments.n) == (expected["model"], str(tmp_path), 3)
    assert task.headline == "reward" and arguments.benchmarks == ["task"]


def test_plain_prompts_are_continued_without_a_template():
    messages = [{"role": "user", "content": "1 + 1?"}]
    assert texts_to_continue([messages], has_template=True) is None
    assert texts_to_continue([messages], has_template=False) == ["1 + 1?\n\n"]
    assert texts_to_continue(["1 + 1 ="], has_template=True) == ["1 + 1 ="]


def test_plain_prompts_reach_the_model_as_in_training():
    """`conversational: false` trains on texts, also if the tokenizer has a chat template."""
    tokenizer = build_tokenizer()
    backend = TransformersBackend.__new__(TransformersBackend)
    backend.processing_class = backend.tokenizer = tokenizer
    backend.template_kwargs = {}
    ids = backend._encode([Request("AB=7", 0)])["input_ids"]
    assert ids.tolist() == tokenizer(["AB=7"])["input_ids"]
