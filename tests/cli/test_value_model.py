"""The critic's settings in a run file and on the command line."""

import json
from pathlib import Path

import pytest
import yaml

from sapo_trl.cli import main
from sapo_trl.embedded import build_model, build_processor


EMBEDDED_CONFIG = Path(__file__).parents[2] / "trainer_configs" / "embedded.yaml"


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """The policy's folder, and one of a model with fewer layers."""
    policy, small = tmp_path / "policy", tmp_path / "small"
    model = build_model()
    model.save_pretrained(policy)
    config = model.config
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    type(model)(config).save_pretrained(small)
    build_processor().save_pretrained(policy)
    return {"policy": policy, "small": small}


def train(tmp_path, policy: Path, arguments: list[str], **settings) -> tuple[int, Path]:
    file, output = tmp_path / "run.yaml", tmp_path / "out"
    given = yaml.safe_load(EMBEDDED_CONFIG.read_text())
    given |= {"model_name_or_path": str(policy), "output_dir": str(output), "embedded_problems": 8}
    given |= {"per_device_train_batch_size": 2, "num_mini_batches": 2, "max_completion_length": 4, "max_steps": 2}
    file.write_text(yaml.safe_dump(given | settings))
    return main(["train", "--config", str(file), *arguments]), output


def layers_of(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["text_config"]["num_hidden_layers"]


@pytest.mark.parametrize("place", ["file", "command line"])
def test_a_smaller_critic(place, folders, tmp_path):
    small = str(folders["small"])
    settings, arguments = ({"value_model": small}, []) if place == "file" else ({}, ["--value_model", small])
    code, output = train(tmp_path, folders["policy"], arguments, **settings)
    assert code == 0
    assert layers_of(output / "critic") == 1 < layers_of(output)


@pytest.mark.parametrize("place", ["file", "command line"])
def test_a_bounded_critic_that_starts_at_the_mean_reward(place, folders, tmp_path):
    settings, arguments = {"value_range": [0.0, 1.0], "critic_initial_value": "reward_mean"}, []
    if place == "command line":
        settings, arguments = {}, ["--value_range", "0", "1", "--critic_initial_value", "reward_mean"]
    code, output = train(tmp_path, folders["policy"], arguments, **settings)
    saved = json.loads((output / "critic" / "value_head.json").read_text())
    assert code == 0 and saved["value_range"] == [0.0, 1.0] and saved["value_offset"] != 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--value_model", "no/such/folder"], "no/such/folder"),
        (["--value_model", "{small}", "--critic", "none"], "`value_model` was given, but `critic='none'`"),
    ],
)
def test_mistakes_are_one_line(arguments, message, folders, tmp_path, capsys):
    arguments = [argument.format(**folders) for argument in arguments]
    code, _ = train(tmp_path, folders["policy"], arguments)
    error = capsys.readouterr().err
    assert code == 2 and "sapo-trl train: error: " in error and message in error and "Traceback" not in error
