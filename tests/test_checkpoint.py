"""What a run saves, and that it can be taken up again."""

import logging

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from sapo_trl import SegmentValueHead

from .testing_utils import Recorder, fixed_rollout, logged, random_completions, sapo_trainer, state_of


ALL_FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl", "qwen3_vl"], indirect=True)
CRITICS = pytest.mark.parametrize("critic", ["separate", "shared"])


class TestSavedModels:
    @ALL_FAMILIES
    @CRITICS
    def test_policy_and_critic_load_apart_from_each_other(self, family, critic, tmp_path):
        trainer = sapo_trainer(family, tmp_path / "run", critic=critic)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))

        auto_class = AutoModelForImageTextToText if family.takes_images else AutoModelForCausalLM
        policy, info = auto_class.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        trained = trainer.model.state_dict()
        assert policy.state_dict().keys() == trained.keys()
        assert all(torch.equal(tensor, trained[name]) for name, tensor in policy.state_dict().items())
        assert type(policy) is type(trainer.model)

        loaded = SegmentValueHead.from_pretrained(tmp_path / "saved" / "critic")
        assert loaded.mode == critic
        trained = trainer.critic.value_head.state_dict()
        assert loaded.state_dict().keys() == trained.keys()
        assert all(torch.equal(tensor, trained[name]) for name, tensor in loaded.state_dict().items())

    @ALL_FAMILIES
    @CRITICS
    def test_weight_sync_sees_no_critic(self, family, critic, tmp_path):
        """What a sampler is sent are `trainer.model`'s named parameters: exactly those of an untouched policy."""
        trainer = sapo_trainer(family, tmp_path, critic=critic)
        assert {n for n, _ in trainer.model.named_parameters()} == {
            n for n, _ in family.build_model().named_parameters()
        }
        policy = {parameter.data_ptr() for parameter in trainer.model.parameters()}
        assert not policy & {parameter.data_ptr() for parameter in trainer.critic.value_head.parameters()}

    @pytest.mark.parametrize("family", ["qwen2"], indirect=True)
    @CRITICS
    def test_saved_critic_as_value_model(self, family, critic, tmp_path):
        trainer = sapo_trainer(family, tmp_path / "run", critic=critic)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        again = sapo_trainer(
            family,
            tmp_path / "again",
            critic=critic,
            trainer_kwargs={"value_model": str(tmp_path / "saved" / "critic")},
        )
        expected = state_of(trainer.critic.value_head)
        assert all(torch.equal(t, expected[n]) for n, t in state_of(again.critic.value_head).items())

    @pytest.mark.parametrize("family", ["qwen2"], indirect=True)
    def test_without_critic_no_folder(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path, critic="none", save_strategy="steps", save_steps=2)
        trainer.train()
        assert (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()
        assert not list(tmp_path.rglob("critic*"))


class TestResume:
    def run(self, family, folder, *, resume=None, steps=4, callbacks=(), peft_config=None, **overrides):
        settings = {
            "max_steps": steps,
            "lr_scheduler_type": "linear",
            "critic_lr_warmup_steps": 1,
            "learning_rate": 0.02,
            "critic_learning_rate": 0.02,
            "save_strategy": "steps",
            "save_steps": 2,
            **overrides,
        }
        trainer_kwargs = {"callbacks": list(callbacks), "peft_config": peft_config}
        trainer = sapo_trainer(family, folder, trainer_kwargs=trainer_kwargs, **settings)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer

    @pytest.mark.parametrize(
        ("family", "critic"),
        [
            ("qwen2", "separate"),
            ("qwen2", "shared"),
            ("qwen2", "none"),
            ("qwen2_5_vl", "separate"),  # whose weights have other names in a checkpoint than in the model
            ("qwen3_vl", "shared"),
        ],
        indirect=["family"],
    )
    def test_four_steps_are_two_and_two_more(self, family, critic, tmp_path):
        """Bit for bit, generation included, where a rollout begins (here: every two steps)."""
        self.check(family, tmp_path, critic=critic)

    @pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
    def test_weights_that_are_found_under_other_names_are_not_called_missing(self, family, tmp_path):
        self.run(family, tmp_path, steps=2)
        records = []
        handler = logging.Handler()
        handler.emit = records.append
        logging.getLogger("transformers.trainer").addHandler(handler)
        try:
            self.run(family, tmp_path, resume=tmp_path / "checkpoint-2", steps=3)
        finally:
            logging.getLogger("transformers.trainer").removeHandler(handler)
        assert not [record.getMessage() for record in records if "keys in the checkpoint" in record.getMessage()]

    @pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
    def test_the_same_with_an_adapter(self, family, tmp_path):
        self.check(family, tmp_path, critic="separate", peft_config=LoraConfig(r=2, target_modules=["q_proj"]))

    def check(self, family, tmp_path, critic, **kwargs):
        first, second = Recorder(), Recorder()
        whole = self.run(family, tmp_path / "whole", critic=critic, callbacks=[first], **kwargs)
        checkpoint = tmp_path / "whole" / "checkpoint-2"
        parts = self.run(family, tmp_path / "parts", critic=critic, resume=checkpoint, callbacks=[second], **kwargs)
        assert parts.state.global_step == 4
        assert first.steps == [0, 2] and second.steps == [2]
        assert torch.equal(first.rollouts[1].completion_ids, second.rollouts[0].completion_ids)
        assert torch.equal(first.rollouts[1].prompt_ids, second.rollouts[0].prompt_ids)
        pairs = [(whole.model, parts.model)]
        if critic != "none":
            pairs.append((whole.critic.value_head, parts.critic.value_head))
            assert logged(parts, "critic_lr") == logged(whole, "critic_lr")
            assert len(set(logged(whole, "critic_lr"))) > 2  # the schedule moves, so a forgotten one would show
        for one, other in pairs:
            expected = state_of(one)
            assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(other).items())

    @pytest.mark.parametrize(
        ("family", "step"),
        [*(("qwen2", step) for step in (1, 2, 3, 5, 6, 7)), ("qwen2_5_vl", 3), ("qwen2_5_vl", 6)],
        indirect=["family"],
    )
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"critic": "shared", "gradient_accumulation_steps": 2, "steps": 12},
            {"num_iterations": 2, "critic": "none", "advantage_estimator": "batch"},
        ],
        ids=["plain", "accumulation", "iterations"],
    )
    def test_resuming_anywhere(self, family, step, settings, tmp_path):
        """
        Bit for bit, also in the middle of a rollout and in a later epoch: with accumulation each rollout is one, and
        shuffled differently.
        """
        run = {"steps": 8, "per_device_train_batch_size": 1, "num_mini_batches": 4, "save_steps": step, **settings}
        first, second = Recorder(), Recorder()
        whole = self.run(family, tmp_path / "whole", callbacks=[first], **run)
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        parts = self.run(family, tmp_path / "parts", resume=checkpoint, callbacks=[second], **run)
        assert parts.state.global_step == run["steps"]
        assert second.steps == [at for at in first.steps if at >= step]
        expected = [rollout for rollout, at in zip(first.rollouts, first.steps, strict=True) if at >= step]
        for rollout, wanted in zip(second.rollouts, expected, strict=True):
            assert torch.equal(rollout.prompt_ids, wanted.prompt_ids)
            assert torch.equal(rollout.completion_ids, wanted.completion_ids)
        modules = [(whole.model, parts.model)]
        if whole.critic is not None:
            modules.append((whole.critic.value_head, parts.critic.value_head))
        for one, other in modules:
            state = state_of(one)
            assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(other).items())

    @pytest.mark.parametrize("family", ["qwen2"], indirect=True)
    @pytest.mark.parametrize(
        ("step", "changed"),
        [
            (3, {"gradient_accumulation_steps": 2}),  # in the middle of a rollout
            (4, {"gradient_accumulation_steps": 2}),  # at its end
            (3, {"per_device_train_batch_size": 2}),
            (4, {"num_mini_batches": 3}),
            (4, {"num_iterations": 2}),
        ],
        ids=["middle", "end", "batch size", "mini-batches", "iterations"],
    )
    def test_resuming_with_other_batches_begins_with_a_whole_rollout(self, family, step, changed, tmp_path, caplog):
        first, second = Recorder(), Recorder()
        run = {"per_device_train_batch_size": 1, "num_mini_batches": 4, "critic": "none", "save_steps": step}
        run["advantage_estimator"] = "batch"
        self.run(family, tmp_path / "whole", steps=step, callbacks=[first], **run)
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        run |= {**changed, "steps": step + 9, "save_strategy": "no"}
        parts = self.run(family, tmp_path / "parts", resume=checkpoint, callbacks=[second], **run)
        assert parts.state.global_step == step + 9
        steps_per_rollout = run["num_mini_batches"] * run.get("num_iterations", 1)
        assert second.steps == list(range(step, step + 9, steps_per_rollout))
        rows = run["per_device_train_batch_size"] * parts.args.steps_per_generation
        assert {len(rollout.rewards) for rollout in second.rollouts} == {rows}
        name, size = next(iter(changed.items()))
        warning = next(record.getMessage() for record in caplog.records if "is resumed with" in record.getMessage())
        assert f"{name}={size}" in warning or name == "num_mini_batches"

    @pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
    @pytest.mark.parametrize("step", [2, 3])
    def test_trees(self, family, step, tmp_path):
        """Edges of earlier rollouts are drawn after resuming too, with their images."""
        tree = {"critic": "tree", "segmentation": "sequence", "tree_widths": [2, 2], "tree_segment_length": 3}
        run = {**tree, "num_generations": 2, "tree_edges_per_prompt": 2, "beta": 0.0, "steps": 6, "save_steps": step}
        whole = self.run(family, tmp_path / "whole", **run)
        parts = self.run(family, tmp_path / "parts", resume=tmp_path / "whole" / f"checkpoint-{step}", **run)
        assert max(logged(parts, "tree/edge_age")) > 0
        assert logged(parts, "tree/edge_age") == logged(whole, "tree/edge_age")
        expected = state_of(whole.model)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(parts.model).items())

    @pytest.mark.parametrize("family", ["qwen2"], indirect=True)
    @pytest.mark.parametrize("steps", [2, 3, 4])
    def test_a_finished_run_trains_no_step_more(self, family, steps, tmp_path):
        """Resumed from its last checkpoint, in the middle of an epoch or a rollout or not."""
        run = {"steps": steps, "per_device_train_batch_size": 1, "save_steps": 1}
        whole = self.run(family, tmp_path, **run)
        again = self.run(family, tmp_path, resume=tmp_path / f"checkpoint-{steps}", **run)
        assert again.state.global_step == steps
        expected = state_of(whole.model)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(again.model).items())

    @pytest.mark.parametrize("family", ["qwen2"], indirect=True)
    def test_resumed_critic_needs_its_optimizer(self, family, tmp_path):
        """The test above can fail: without the critic's optimizer state the run ends elsewhere."""
        whole = self.run(family, tmp_path / "whole")
        (tmp_path / "whole" / "checkpoint-2" / "critic_optimizer.pt").unlink()
        parts = self.run(family, tmp_path / "parts", resume=tmp_path / "whole" / "checkpoint-2")
        expected = state_of(whole.critic.value_head)
        assert any(not torch.equal(t, expected[n]) for n, t in state_of(parts.critic.value_head).items())

    @pytest.mark.parametrize("family", ["qwen2"], indirect=True)
    def test_checkpoint_without_critic(self, family, tmp_path):
        self.run(family, tmp_path / "none", critic="none", steps=2)
        with pytest.raises(FileNotFoundError, match="checkpoint-2.*holds no critic"):
            self.run(family, tmp_path / "parts", resume=tmp_path / "none" / "checkpoint-2")

    @pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
    def test_best_checkpoint_brings_its_critic(self, family, tmp_path):
        rollout = fixed_rollout(random_completions(5))
        trainer = sapo_trainer(
            family,
            tmp_path,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            per_device_eval_batch_size=4,
            load_best_model_at_end=True,
            metric_for_best_model="eval_reward",  # the same each time, with fixed completions: the first is the best
            greater_is_better=True,
            trainer_kwargs={"eval_dataset": family.dataset(4), "rollout_func": rollout},
        )
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
        auto_class = AutoModelForImageTextToText if family.takes_images else AutoModelForCausalLM
        best = auto_class.from_pretrained(tmp_path / "checkpoint-2").state_dict()
        assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())
        best = SegmentValueHead.from_pretrained(tmp_path / "checkpoint-2" / "critic").state_dict()
        assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.critic.value_head.state_dict().items())
