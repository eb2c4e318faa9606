"""`sapo-trl train --dry_run` with each file of `trainer_configs/`: its data's schema, a tiny model for its own."""

from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from sapo_trl import PRESETS
from sapo_trl.cli import main
from sapo_trl.config import default_settings
from tests.data.test_loading import ROWS, SCHEMAS
from tests.testing_utils import FAMILIES


ROOT = Path(__file__).parents[2]
RUN_FILES = sorted((ROOT / "trainer_configs").glob("*.yaml"))
# The machine is a CPU, and its time is short.
MACHINE = {"use_cpu": "true", "bf16": "false", "fp16": "false", "use_vllm": "false", "gradient_checkpointing": "false"}
SIZES = {"max_completion_length": 4, "embedded_problems": 8, "min_pixels": 784, "max_pixels": 4096}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer, qwen2_5_vl_processor) -> Path:
    """A folder with two models, and the data sets under the names that they have in the files."""
    folder = tmp_path_factory.mktemp("workplace")
    for name, processing_class in (("qwen2", tokenizer), ("qwen2_5_vl", qwen2_5_vl_processor)):
        FAMILIES[name](processing_class).build_model().save_pretrained(folder / name)
        processing_class.save_pretrained(folder / name)
    for hub_id, schema in SCHEMAS.items():
        (folder / hub_id).mkdir(parents=True)
        rows = Dataset.from_list([ROWS[hub_id]] * 8, features=schema)
        rows.to_parquet(folder / hub_id / "train-00000-of-00001.parquet")
    questions = folder / "outputs" / "smoke_real" / "questions"
    questions.mkdir(parents=True)
    Dataset.from_list([{"question": "4 + 17 =", "answer": "#### 21"}] * 8).to_json(questions / "train.jsonl")
    return folder


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_each_run_file(path, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    settings = yaml.safe_load(path.read_text())
    with_images = settings["dataset_name"] in ("embedded", "hiyouga/geometry3k")
    model = "qwen2_5_vl" if with_images else "qwen2"
    overrides = {"model_name_or_path": model, "output_dir": f"out/{path.stem}", **MACHINE, **SIZES}
    code = main(["train", "--config", str(path), *(f"--{k}={v}" for k, v in overrides.items()), "--dry_run"])
    shown = " ".join(capsys.readouterr().out.split())
    assert code == 0
    responses = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    rollout = responses * settings["num_mini_batches"]
    for part in (
        f"responses of a rollout {rollout:,} ",
        f"prompts of a rollout {rollout // settings['num_generations']:,} ",
        f"responses of an optimizer step {responses:,} ",
        f"optimizer steps of the run {settings['max_steps']:,} ",
        "A response to it, sampled now: 4 tokens in ",
        "Nothing was trained (--dry_run).",
    ):
        assert part in shown, part
    # Of the rows, which are one and the same, one is kept.
    rows = 8 if settings["dataset_name"] == "embedded" else 1
    assert f"Training would not start: `train_dataset` has {rows} rows" in shown
    assert ("<|image_pad|>" in shown) == with_images
    assert not list((workplace / overrides["output_dir"]).rglob("*.safetensors"))


@pytest.mark.parametrize("preset", PRESETS)
def test_each_algorithm_file(preset, workplace, monkeypatch, capsys):
    """They name neither model nor data: those are on the command line."""
    monkeypatch.chdir(workplace)
    settings = {"model_name_or_path": "qwen2_5_vl", "dataset_name": "embedded", "embedded_problems": 64}
    settings |= {"output_dir": f"out/{preset}", "per_device_train_batch_size": 32, "num_mini_batches": 2, **MACHINE}
    settings |= {"gradient_accumulation_steps": 1, "max_completion_length": 4, "report_to": "none"}
    path = ROOT / "trainer_configs" / "algorithms" / f"{preset}.yaml"
    code = main(["train", "--config", str(path), *(f"--{k}={v}" for k, v in settings.items()), "--dry_run"])
    shown = " ".join(capsys.readouterr().out.split())
    assert code == 0 and "responses of a rollout 64 " in shown and "Nothing was trained" in shown
    defaults = default_settings()
    for name, value in PRESETS[preset].settings.items():
        if isinstance(value, str) and value != defaults[name]:
            assert f"{name}: {value}" in shown, name
