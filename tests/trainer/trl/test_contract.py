"""What this package relies on in TRL and transformers. A failure here says that they have moved, and what."""

import ast
import inspect
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import (
    add_fused_lm_head,
    disable_dropout_in_model,
    get_callable_name,
    get_config_model_id,
    is_async_callable,
    shuffle_sequence_dict,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

import sapo_trl
from sapo_trl import SAPOConfig, SAPOTrainer
from sapo_trl.trainer.trl.ahead import AheadTrainer
from sapo_trl.trainer.trl.bridge import GRPOBridge
from sapo_trl.trainer.trl.resumable import ResumableTrainer
from tests.testing_utils import Recorder, fixed_rollout, length_reward, random_completions, sapo_config, sapo_trainer


PACKAGE = Path(sapo_trl.__file__).parent
BRIDGE = PACKAGE / "trainer" / "trl"
TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)

# Private methods that the bridge overrides or calls, with the parameters it passes or forwards.
METHODS = {
    "_generate_and_score_completions": ["inputs"],
    "_tokenize_prompts": ["prompts"],
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_get_per_token_logps_and_entropies": [
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ],
    "_prepare_inputs": ["generation_batch"],
    "_compute_loss": ["model", "inputs"],
    "_get_train_sampler": ["dataset"],
    "_get_output_dir": ["trial"],
    "_save_checkpoint": ["model", "trial"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
    "_init_training_state": [
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ],
    "_run_epoch": ["model", "epoch"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_finalize_training": ["trial", "num_train_samples", "start_time"],
}
# Private attributes that it reads or writes.
ATTRIBUTES = {
    "_tokenizer",
    "_video_pad_token_id",
    "_buffered_inputs",
    "_step",
    "_metrics",
    "_logs",
    "_pending_metrics",
    "_pending_extra_logs",
    "_tr_loss",
    "_total_loss_scalar",
    "_globalstep_last_logged",
}
# Public methods that the trainer overrides.
OVERRIDDEN = {
    "__init__",
    "create_accelerator_and_postprocess",
    "get_batch_samples",
    "get_train_dataloader",
    "train",
    "training_step",
    "create_scheduler",
    "save_model",
    "create_model_card",
}


@cache
def private_names_of_trl() -> set[str]:
    """Every private method, class attribute and instance attribute of TRL's trainer and its bases."""
    names = set()
    for cls in GRPOTrainer.__mro__:
        if cls is object:
            continue
        names |= vars(cls).keys()
        for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(cls)))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def private_names_in(path: Path) -> set[str]:
    """Every private attribute that a file touches on any object, and every private method it defines."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            names |= {item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


class TestNames:
    def test_trl_has_private_names_to_find(self):
        """Of the search itself."""
        names = private_names_of_trl()
        assert METHODS.keys() | ATTRIBUTES <= names
        assert "_step" in names and "_train_batch_size" in names  # an attribute of TRL's, one of transformers'

    @pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
    def test_only_the_bridge_touches_private_names_of_trl(self, path):
        touched = private_names_in(path) & private_names_of_trl()
        allowed = METHODS.keys() | ATTRIBUTES if BRIDGE in path.parents else set()
        assert touched <= allowed

    def test_bridge_touches_exactly_these(self):
        touched = set().union(*map(private_names_in, BRIDGE.glob("*.py")))
        assert touched & private_names_of_trl() == METHODS.keys() | ATTRIBUTES

    @pytest.mark.parametrize("name", METHODS)
    def test_method_takes_these_parameters(self, name):
        parameters = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)[1:]
        assert parameters[: len(METHODS[name])] == METHODS[name]

    def test_multimodal_tensors_are_forwarded_by_name(self):
        parameters = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        assert {"pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids"} <= parameters.keys()

    def test_no_public_name_hides_one_of_trl(self):
        ours = vars(SAPOTrainer).keys() | vars(GRPOBridge).keys() | vars(ResumableTrainer).keys()
        ours |= vars(AheadTrainer).keys()
        theirs = set().union(*(vars(cls) for cls in GRPOTrainer.__mro__))
        private = METHODS.keys() | {"_tag_names", "_name", "_paper"}
        dunders = {"__module__", "__doc__", "__qualname__", "__firstlineno__", "__static_attributes__"}
        assert ours & theirs - dunders == OVERRIDDEN | private

    def test_model_card_attributes_exist(self):
        for name in ("_tag_names", "_name", "_paper"):
            assert hasattr(_BaseTrainer, name)

    def test_helpers_take_these_parameters(self):
        expected = {
            add_fused_lm_head: ["model", "temperature", "cast_lm_head_to_fp32", "outputs"],
            disable_dropout_in_model: ["model"],
            get_config_model_id: ["config"],
            get_callable_name: ["func"],
            is_async_callable: ["func"],
            prepare_deepspeed: ["model", "accelerator"],
            prepare_fsdp: ["model", "accelerator"],
            Trainer.create_scheduler: ["self", "num_training_steps"],
            Trainer.save_model: ["self", "output_dir", "_internal_call"],
            Trainer.get_decay_parameter_names: ["self", "model"],
            GRPOTrainer.create_model_card: ["self", "model_name", "dataset_name", "tags"],
            GRPOTrainer.training_step: ["self", "model", "inputs", "num_items_in_batch"],
        }
        for function, names in expected.items():
            assert list(inspect.signature(function).parameters)[: len(names)] == names, function

    def test_one_generation_passes(self, tmp_path):
        with pytest.raises(ValueError, match="at least 2 generations"):
            GRPOConfig(str(tmp_path), num_generations=1, bf16=False, use_cpu=True)
        args = sapo_config(tmp_path, num_generations=1)
        assert args.num_generations == 1 and type(args.num_generations) is int


class TestBatches:
    @pytest.mark.parametrize(
        "key",
        [
            "prompt_ids",
            "prompt_mask",
            "completion_ids",
            "completion_mask",
            "tool_mask",
            "old_per_token_logps",
            "ref_per_token_logps",
            "importance_sampling_ratio",
        ],
    )
    def test_rollout_has_this_key(self, key):
        """Some of them appear under vLLM or with tools only, so the source is asked."""
        assert f'output["{key}"] = ' in (source := inspect.getsource(GRPOTrainer)) or f'"{key}": {key}' in source

    def test_extra_tensors_survive_shuffle_and_split_with_their_rows(self):
        torch.manual_seed(0)
        rows, images = 8, [1, 0, 2, 1, 0, 1, 1, 2]
        grid = torch.tensor([[1, 2, 2 * (1 + i % 3)] for i in range(sum(images))])
        row_of_image = torch.repeat_interleave(torch.arange(rows), torch.tensor(images))
        batch = {
            "prompt_ids": torch.arange(rows).unsqueeze(1),
            "advantages": torch.arange(rows * 3.0).view(rows, 3),
            "segment_ids": torch.arange(rows * 3).view(rows, 3),
            "num_images": images,
            "image_grid_thw": grid,
            "pixel_values": torch.repeat_interleave(row_of_image, grid.prod(1)).unsqueeze(1).float(),
            "num_items_in_batch": torch.tensor(24),
            "nothing": None,
        }
        shuffled = shuffle_sequence_dict(split_pixel_values_by_grid(batch))
        chunks = [unsplit_pixel_values_by_grid(chunk) for chunk in split_tensor_dict(shuffled, 4)]
        seen = []
        for chunk in chunks:
            ids = chunk["prompt_ids"].squeeze(1)
            seen += ids.tolist()
            assert torch.equal(chunk["advantages"], batch["advantages"][ids])
            assert torch.equal(chunk["segment_ids"], batch["segment_ids"][ids])
            assert chunk["num_images"] == [images[i] for i in ids]
            expected = torch.cat([batch["pixel_values"][batch["pixel_values"][:, 0] == i] for i in ids])
            assert torch.equal(chunk["pixel_values"], expected)
            assert chunk["image_grid_thw"].prod(1).sum() == len(expected)
            assert chunk["num_items_in_batch"] == 24 and chunk["nothing"] is None
        assert sorted(seen) == list(range(rows)) and seen != list(range(rows))

    @pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
    def test_rollout_tensors_reach_the_loss_with_their_rows(self, family, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            trainer_kwargs={"callbacks": [recorder], "rollout_func": fixed_rollout(random_completions(5))},
        )
        trainer.train()
        rollout = recorder.rollouts[0]
        ours = {
            "advantages": rollout.advantages,
            "returns": rollout.returns,
            "old_values": rollout.values,
            "old_per_token_logps": rollout.logps,
            "segment_ids": rollout.segments.ids,
        }
        rows = {tuple(ids): index for index, ids in enumerate(rollout.completion_ids.tolist())}
        assert len(rows) == 4
        order = []
        for batch in trainer.micro_batches:
            for row, ids in enumerate(batch["completion_ids"].tolist()):
                order.append(rows[tuple(ids)])
                for name, tensor in ours.items():
                    assert torch.equal(batch[name][row], tensor[order[-1]]), name
        assert sorted(order) == [0, 1, 2, 3]


class TestForwards:
    @TEXT_FAMILY
    def test_fused_head_returns_log_probabilities_and_entropies_of_all_but_the_last_position(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path)
        ids = torch.tensor([[20, 21, 22, 23], [24, 25, 26, 27]])
        output = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
        assert output.log_probs.shape == output.entropy.shape == (2, 3)
        assert output.log_probs.requires_grad and output.entropy.requires_grad
        assert not hasattr(output, "logits")

    @TEXT_FAMILY
    @pytest.mark.parametrize("critic", ["separate", "shared", "ladder"])
    @pytest.mark.parametrize(("mini_batches", "scoring_chunks"), [(2, 2), (1, 1)])
    def test_rollout_is_scored_by_one_forward(self, family, critic, mini_batches, scoring_chunks, tmp_path):
        """With two mini-batches TRL computes old log-probabilities, with one it does not; never is it done twice."""
        trainer = sapo_trainer(
            family,
            tmp_path,
            critic=critic,
            num_mini_batches=mini_batches,
            max_steps=mini_batches,
            beta=0.0,
            trainer_kwargs={"rollout_func": fixed_rollout(random_completions())},
        )
        rows = {"policy": [], "critic": []}

        def count(name):
            return lambda module, args, kwargs, output: rows[name].append(len(kwargs["input_ids"]))

        trainer.model.model.register_forward_hook(count("policy"), with_kwargs=True)
        if critic == "separate":
            trainer.critic.value_head.backbone.register_forward_hook(count("critic"), with_kwargs=True)
        trainer.train()
        # In chunks of `per_device_train_batch_size` rows: once over the rollout, once over every micro-batch.
        assert rows["policy"] == [2] * (scoring_chunks + mini_batches)
        assert rows["critic"] == (rows["policy"] if critic == "separate" else [])

    @TEXT_FAMILY
    def test_reward_hook_returns_one_row_a_completion_and_one_column_a_function(self, family, tmp_path):
        returned = []

        class Spy(SAPOTrainer):
            def _calculate_rewards(self, *args, **kwargs):
                returned.append(super()._calculate_rewards(*args, **kwargs))
                return returned[-1]

        recorder = Recorder()
        trainer = Spy(
            model=family.build_model(),
            reward_funcs=[length_reward, lambda completions, **kwargs: [0.5, None, 0.25, None]],
            args=sapo_config(tmp_path, reward_weights=[2.0, 4.0]),
            train_dataset=family.dataset(),
            processing_class=family.tokenizer,
            callbacks=[recorder],
        )
        trainer.train()
        rollout = recorder.rollouts[0]
        lengths = length_reward(rollout.completion_ids.tolist())
        assert returned[0].shape == (4, 2)
        assert returned[0][:, 0].tolist() == pytest.approx(lengths)
        assert returned[0][:, 1].isnan().tolist() == [False, True, False, True]
        assert rollout.rewards.tolist() == pytest.approx(
            [2 * lengths[0] + 2, 2 * lengths[1], 2 * lengths[2] + 1, 2 * lengths[3]]
        )

    @TEXT_FAMILY
    def test_grpo_loss_takes_advantages_per_token(self, family, tmp_path):
        """TRL promises this to subclasses; we do not use its loss, but its logging and checks assume such a batch."""
        trainer = sapo_trainer(
            family, tmp_path, beta=0.0, trainer_kwargs={"rollout_func": fixed_rollout(random_completions(5))}
        )
        trainer.train()
        batch = dict(trainer.micro_batches[0])
        del batch["old_per_token_logps"]  # then on-policy: every ratio is 1
        trainer.loss_type, trainer.importance_sampling_level = "grpo", "token"
        trainer.model.eval()
        loss = GRPOTrainer._compute_loss(trainer, trainer.model, batch)
        mask = batch["completion_mask"]
        expected = -((batch["advantages"] * mask).sum(1) / mask.sum(1)).mean()
        assert batch["advantages"].dim() == 2 and expected.abs() > 1e-3
        torch.testing.assert_close(loss, expected)

    @TEXT_FAMILY
    def test_configuration_is_a_grpo_configuration(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path)
        assert isinstance(trainer, GRPOTrainer)
        assert isinstance(trainer.args, SAPOConfig) and isinstance(trainer.args, GRPOConfig)
        assert trainer.args.steps_per_generation == 2 and trainer.args.generation_batch_size == 4
