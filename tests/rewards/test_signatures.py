"""Reward functions that cannot be called with the data's columns are refused before a model is loaded."""

import functools

import pytest
from datasets import Dataset
from transformers import Qwen2Config

from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.cli import main
from sapo_trl.cli.train import TrainArguments, load_prompts
from sapo_trl.data import own_columns
from sapo_trl.rewards import accuracy_reward
from sapo_trl.rewards.signatures import check_reward_arguments


def counts(completions, count, **kwargs):
    return [float(len(text) == int(wanted)) for text, wanted in zip(completions, count, strict=True)]


async def counts_later(completions, count, **kwargs):
    return counts(completions, count)


class Counts:
    def __call__(self, completions, count, **kwargs):
        return counts(completions, count)


def narrow(completions, answer):
    return [1.0] * len(completions)


def with_default(completions, count=None, **kwargs):
    return [1.0] * len(completions)


COLUMNS = ["prompt", "answer"]


@pytest.mark.parametrize("function", [counts, counts_later, Counts(), [accuracy_reward, counts]])
def test_a_column_that_is_not_there(function):
    with pytest.raises(
        ValueError, match=r"needs `count`, but `train_dataset` has only the columns `answer`, `prompt`"
    ):
        check_reward_arguments(function, COLUMNS, "train_dataset")
    check_reward_arguments(function, [*COLUMNS, "count"], "train_dataset")


def test_arguments_that_trl_passes_must_be_taken():
    with pytest.raises(ValueError, match=r"`narrow` does not take .*`trainer_state`.*: add `\*\*kwargs`"):
        check_reward_arguments(narrow, COLUMNS, "train_dataset")


def test_functions_that_can_be_called_pass():
    bound = functools.partial(counts, count=[3])

    @functools.wraps(narrow)
    def decorated(**kwargs):
        return narrow(kwargs["completions"], kwargs["answer"])

    check_reward_arguments(
        [accuracy_reward, with_default, bound, decorated, "a/model", None], COLUMNS, "train_dataset"
    )


def test_the_trainer_refuses_before_it_loads_a_model(tmp_path):
    dataset = Dataset.from_dict({"prompt": ["1?"], "answer": ["1"]})
    args = SAPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="Reward function `counts` needs `count`"):
        SAPOTrainer("no/such-model", counts, args, dataset)
    with pytest.raises(ValueError, match="but `eval_dataset` has only"):
        with_count = dataset.add_column("count", ["1"])
        SAPOTrainer("no/such-model", counts, args, with_count, eval_dataset=dataset)


def test_the_answer_keeps_the_name_of_its_column(tmp_path):
    Dataset.from_dict({"question": ["1?", "22?"], "count": ["2", "3"]}).to_json(tmp_path / "train.jsonl")
    columns = {"problem": "question", "answer": "count"}
    rows, _ = load_prompts(TrainArguments(dataset_name=str(tmp_path), columns=columns, conversational=False), "train")
    assert rows["count"] == rows["answer"] == ["2", "3"] and set(rows.column_names) == {"prompt", "answer", "count"}
    check_reward_arguments(counts, rows.column_names, "train_dataset")
    # TRL has another use for these names.
    for reserved in ("completion", "chosen"):
        assert reserved in own_columns(["problem", reserved], {"answer": reserved}).consumed


def test_the_command_ends_with_one_line(tmp_path, monkeypatch, capsys, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")  # no weights: nothing loads them
    Dataset.from_dict({"problem": ["1?"] * 2, "answer": ["1", "2"]}).to_json(tmp_path / "train.jsonl")
    (tmp_path / "rewards_that_count.py").write_text("def counts(completions, count, **kwargs):\n    return []\n")
    monkeypatch.chdir(tmp_path)
    command = ["train", "--model_name_or_path", "model", "--dataset_name", "train.jsonl", "--output_dir", "out"]
    command += [
        "--reward_funcs",
        "rewards_that_count.counts",
        "--use_cpu",
        "--bf16",
        "false",
        "--conversational=false",
    ]
    assert main([*command, "--per_device_train_batch_size", "1", "--num_mini_batches", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sapo-trl train: error: Reward function `counts` needs `count`, but `train_dataset`")
