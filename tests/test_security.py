"""What comes with models, data and settings of others is read, and never run."""

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, dynamic_module_utils

from sapo_trl.cli import main
from sapo_trl.cli.train import TrainArguments, load_prompts
from sapo_trl.evaluation.backends import make_backend
from sapo_trl.evaluation.settings import EvalArguments
from tests.testing_utils import FAMILIES


@pytest.fixture
def ran(tmp_path):
    """A file that hostile code would make."""
    return tmp_path / "ran"


@pytest.fixture
def model_folder(tokenizer, tmp_path):
    folder = tmp_path / "model"
    FAMILIES["qwen2"](tokenizer).build_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "train.jsonl"
    Dataset.from_dict({"question": ["1 + 1?"] * 2, "answer": ["#### 2", "#### 3"]}).to_json(path)
    return path


def evaluate(folder: Path, questions: Path, *more: str) -> int:
    arguments = ["eval", "--model", str(folder), "--benchmarks", f"gsm8k={questions}", "--max_new_tokens", "1"]
    return main([*arguments, "--output_dir", str(questions.parent / "evaluated"), *more])


def train(folder: Path, questions: Path) -> int:
    arguments = ["train", "--model_name_or_path", str(folder), "--dataset_name", str(questions)]
    arguments += ["--dataset_format", "gsm8k", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    arguments += ["--per_device_train_batch_size", "2", "--num_mini_batches", "1"]
    return main([*arguments, "--output_dir", str(questions.parent / "trained"), "--critic", "none"])


class TestCodeOfAModel:
    @pytest.fixture
    def folder(self, model_folder, ran, tmp_path, monkeypatch):
        """A model whose architecture is a Python file of its own."""
        monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr(sys, "path", [*sys.path])
        (model_folder / "its_own.py").write_text(
            f"open({str(ran)!r}, 'w').close()\nfrom transformers import Qwen2Config\nclass OwnConfig(Qwen2Config):\n"
            "    model_type = 'its_own'\n"
        )
        config = json.loads((model_folder / "config.json").read_text())
        config |= {"model_type": "its_own", "auto_map": {"AutoConfig": "its_own.OwnConfig"}}
        (model_folder / "config.json").write_text(json.dumps(config))
        return model_folder

    def test_is_not_run_unless_asked_for(self, folder, questions, ran, capsys):
        for command in (evaluate, train):
            assert command(folder, questions) == 2
            assert "trust_remote_code" in capsys.readouterr().err
        assert not ran.exists()
        evaluate(folder, questions, "--trust_remote_code", "true")
        assert ran.exists()  # so it would have been


class TestPickles:
    """Sound weights in a pickle, which transformers and PEFT would load."""

    def test_models(self, model_folder, questions, capsys):
        torch.save(load_file(model_folder / "model.safetensors"), model_folder / "pytorch_model.bin")
        (model_folder / "model.safetensors").unlink()
        AutoModelForCausalLM.from_pretrained(model_folder)
        assert evaluate(model_folder, questions) == 2
        assert "model.safetensors" in capsys.readouterr().err
        assert train(model_folder, questions) == 2
        assert "model.safetensors" in capsys.readouterr().err

    @pytest.mark.parametrize("backend", ["transformers", "vllm"])
    def test_adapters(self, backend, model_folder, tmp_path):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), LoraConfig(r=2))
        model.save_pretrained(tmp_path / "adapter")
        weights = tmp_path / "adapter" / "adapter_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
        arguments = EvalArguments(model=str(model_folder), adapter=str(tmp_path / "adapter"), backend=backend)
        with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors; no other format is loaded"):
            make_backend(arguments)


@pytest.mark.parametrize("command", [["train"], ["eval"], ["plan"], ["study", "run"]], ids=" ".join)
def test_yaml_makes_no_objects(command, ran, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{ran}']]\n"
    )
    try:
        code = main([*command, "--config", str(config)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert "could not determine a constructor" in capsys.readouterr().err
    assert not ran.exists()


def test_code_in_a_folder_of_data_is_not_run(questions, ran):
    """As the scripts that data sets once came with."""
    folder = questions.parent
    code = f"open({str(ran)!r}, 'w').close()\n"
    (folder / "__init__.py").write_text(code)
    arguments = TrainArguments(dataset_name=str(folder), dataset_format="gsm8k")
    assert len(load_prompts(arguments, "train")[0]) == 2
    (folder / f"{folder.name}.py").write_text(code)
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):
        load_prompts(arguments, "train")
    assert not ran.exists()
