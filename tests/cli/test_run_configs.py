"""The files in `trainer_configs/`: up to date, parsed by the trainer's parser, with the batches they state."""

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import ModelConfig, TrlParser

from docs.generate.run_configs import FOLDER, MINI_BATCHES, RUNS, Run, yaml_text
from sapo_trl import SAPOConfig
from sapo_trl.cli.train import TrainArguments
from sapo_trl.planner.reading import read_header
from sapo_trl.presets import AXES, RUN_SETTINGS, preset_settings
from sapo_trl.rewards.lookup import find_reward


ROOT = Path(__file__).parents[2]
LAUNCH_FILES = sorted((ROOT / FOLDER / "accelerate").glob("*.yaml"))
# What a machine without GPU cannot parse or need not.
ON_CPU = ["--use_cpu", "true", "--bf16", "false", "--fp16", "false", "--use_vllm", "false"]


def path_of(run: Run) -> Path:
    return ROOT / FOLDER / f"{run.name}.yaml"


def parse(path: Path, *arguments: str) -> tuple[TrainArguments, SAPOConfig, ModelConfig]:
    parser = TrlParser((TrainArguments, SAPOConfig, ModelConfig))
    return parser.parse_args_and_config(["--config", str(path), *arguments])


def algorithm_of(args: SAPOConfig) -> dict[str, object]:
    return {name: getattr(args, name) for names in AXES.values() for name in names if name not in RUN_SETTINGS}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
class TestRuns:
    def test_file_is_up_to_date(self, run):
        """Otherwise: `python -m docs.generate.run_configs`."""
        assert path_of(run).read_text(encoding="utf-8") == yaml_text(run)

    def test_batch_is_what_the_file_states(self, run):
        _, args, _ = parse(path_of(run), *ON_CPU)
        header = read_header(path_of(run))
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * int(header["processes"])
        rollout = per_step * args.num_mini_batches
        assert args.num_mini_batches == 4
        assert rollout % args.num_generations == 0
        prompts = rollout // args.num_generations
        stated = f"# A rollout: {prompts} prompts"
        assert stated in path_of(run).read_text(encoding="utf-8")
        if int(header["gpu_memory_gib"]) >= 80:  # the paper's
            assert (prompts, per_step // args.num_generations) == (512, 128)
            assert args.max_completion_length == 2048
        assert args.max_steps == 200 * MINI_BATCHES
        assert args.temperature == 1.0

    def test_algorithm_is_the_preset(self, run, tmp_path):
        _, args, model_args = parse(path_of(run), *ON_CPU)
        preset = read_header(path_of(run))["preset"]
        expected = algorithm_of(SAPOConfig.from_preset(preset, str(tmp_path), use_cpu=True, bf16=False))
        actual = algorithm_of(args)
        differing = {name for name in expected if actual[name] != expected[name]}
        # An adapter critic stands beside an adapter; nothing else may differ.
        assert differing == ({"critic"} if model_args.use_peft else set())
        assert run.preset == preset
        assert set(preset_settings(preset)) <= set(yaml.safe_load(path_of(run).read_text(encoding="utf-8")))
        if not model_args.use_peft:
            assert args.learning_rate == 1e-6
            assert not args.learns_critic or args.critic_learning_rate == 2e-6

    def test_rewards_exist_and_have_weights(self, run):
        arguments, args, _ = parse(path_of(run), *ON_CPU)
        assert all(callable(find_reward(name)) for name in arguments.reward_funcs)
        assert args.reward_weights is None or len(args.reward_weights) == len(arguments.reward_funcs)

    def test_hardware_is_that_of_the_launch_file(self, run):
        header = read_header(path_of(run))
        launch = load_config_from_file(str(ROOT / header["accelerate"]))
        assert launch.num_processes == int(header["processes"])
        stage = (getattr(launch, "deepspeed_config", None) or {}).get("zero_stage")
        assert header["sharding"] == (f"zero{stage}" if stage else "none")

    def test_as_it_will_be_used(self, run):
        """With vLLM and half precision as the file has them."""
        _, args, _ = parse(path_of(run), "--use_cpu", "true")
        assert args.fp16 is ("t4" in run.name)
        assert args.bf16 is not args.fp16
        assert args.gradient_checkpointing
        assert not args.use_vllm or args.vllm_mode == "colocate"


def test_no_other_file_is_there():
    assert {path.stem for path in (ROOT / FOLDER).glob("*.yaml")} == {run.name for run in RUNS} | {
        "embedded",
        "smoke_real",
    }


def test_every_row_of_the_papers_tables_has_a_file():
    names = {run.name for run in RUNS}
    for size in ("3b", "7b"):
        assert {f"geo3k_qwen2.5_vl_{size}_{preset}" for preset in ("sapo", "grpo", "ppo", "vc_ppo")} <= names
    assert {f"geo3k_qwen2.5_vl_7b_sapo_{part}" for part in ("naive_is", "newline", "step", "prob")} <= names
    for model in ("geo3k_qwen3_vl_4b_thinking", "gsm8k_deepseekmath_7b", "math_rho_1.1b"):
        assert {f"{model}_{preset}" for preset in ("sapo", "grpo", "ppo")} <= names


def test_an_unknown_setting_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(path_of(RUNS[0]).read_text(encoding="utf-8") + "top_precent: 30\n", encoding="utf-8")
    with pytest.raises(ValueError, match="Unknown arguments from config file.*top_precent"):
        parse(path, *ON_CPU)


def test_micro_batches_that_do_not_add_up_are_an_error():
    run = Run(**{field.name: getattr(RUNS[0], field.name) for field in fields(Run)} | {"micro_batch": 3})
    with pytest.raises(ValueError, match="512 responses are no multiple of 96"):
        _ = run.batch


class TestLaunchFiles:
    def test_all_are_there(self):
        assert {path.stem for path in LAUNCH_FILES} == {
            "single_gpu",
            "ddp_8gpu",
            "zero2_8gpu",
            "zero3_8gpu",
            "fsdp2_8gpu",
            "two_nodes_8gpu",
        }

    @pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
    def test_accelerate_reads_it(self, path, tmp_path):
        config = load_config_from_file(str(path))
        assert (config.mixed_precision, config.use_cpu) == ("bf16", False)
        machines, processes = {"single_gpu": (1, 1), "two_nodes_8gpu": (2, 16)}.get(path.stem, (1, 8))
        assert (config.num_machines, config.num_processes) == (machines, processes)
        distributed_type = getattr(config.distributed_type, "value", config.distributed_type)
        expected = {"single_gpu": "NO", "ddp_8gpu": "MULTI_GPU", "fsdp2_8gpu": "FSDP"}.get(path.stem, "DEEPSPEED")
        assert distributed_type == expected
        # accelerate refuses what it does not know, so that it has read every key.
        wrong = tmp_path / "wrong.yaml"
        shutil.copy(path, wrong)
        wrong.write_text(wrong.read_text() + "num_procesess: 8\n")
        with pytest.raises(ValueError, match="num_procesess"):
            load_config_from_file(str(wrong))

    def test_nested_keys_are_accelerates(self):
        """Which it reads from the environment, without a word about those it does not know."""
        from accelerate.commands.launch import launch_command_parser

        options = {
            option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings
        }
        for path in LAUNCH_FILES:
            content = yaml.safe_load(path.read_text())
            nested = set(content.get("deepspeed_config", {})) | set(content.get("fsdp_config", {}))
            assert nested <= options, path

    def test_stages(self):
        read = {path.stem: yaml.safe_load(path.read_text()) for path in LAUNCH_FILES}
        stages = {name: content["deepspeed_config"]["zero_stage"] for name, content in read.items() if "zero" in name}
        assert stages == {"zero2_8gpu": 2, "zero3_8gpu": 3}
        assert read["two_nodes_8gpu"]["deepspeed_config"]["zero_stage"] == 3
        assert "machine_rank" not in read["two_nodes_8gpu"]  # it is on the command line
        assert read["fsdp2_8gpu"]["fsdp_config"]["fsdp_version"] == 2
