"""What a run saves, and that it can be taken up again."""

import json
import logging
import shutil

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from sapo_trl import SegmentationCallback, SegmentValueHead
from sapo_trl.callbacks import RolloutCallback
from tests.testing_utils import (
    Recorder,
    fixed_rollout,
    length_reward,
    logged,
    random_completions,
    sapo_trainer,
    state_of,
)


ALL_FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl", "qwen3_vl"], indirect=True)
CRITICS = pytest.mark.parametrize("critic", ["separate", "shared", "ladder"])


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A function that makes a run at its first call and gives it again at the following ones: tests only read it."""
    runs = {}

    def get(key: str, make):
        if key not in runs:
            runs[key] = make(tmp_path_factory.mktemp("undisturbed"))
        return runs[key]

    return get


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
            ("qwen2", "ladder"),
            ("qwen2_5_vl", "ladder"),
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
            assert logged(parts, "critic/learning_rate") == logged(whole, "critic/learning_rate")
            assert (
                len(set(logged(whole, "critic/learning_rate"))) > 2
            )  # the schedule moves, so a forgotten one would show
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
            {"critic": "ladder", "gradient_checkpointing": True, "critic_warmup_steps": 3},
            {"num_iterations": 2, "critic": "none", "advantage_estimator": "batch"},
        ],
        ids=["plain", "accumulation", "ladder", "iterations"],
    )
    def test_resuming_anywhere(self, family, step, settings, tmp_path, undisturbed):
        """
        Bit for bit, also in the middle of a rollout and in a later epoch: with accumulation each rollout is one, and
        shuffled differently.
        """
        run = {"steps": 8, "per_device_train_batch_size": 1, "num_mini_batches": 4, **settings}
        second = Recorder()

        def make(folder):
            recorder = Recorder()
            return self.run(family, folder, callbacks=[recorder], save_steps=1, **run), recorder, folder

        whole, first, folder = undisturbed(f"{family.name} {settings}", make)
        checkpoint = folder / f"checkpoint-{step}"
        parts = self.run(family, tmp_path, resume=checkpoint, callbacks=[second], save_strategy="no", **run)
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
    def test_trees(self, family, step, tmp_path, undisturbed):
        """Edges of earlier rollouts are drawn after resuming too, with their images."""
        tree = {"critic": "tree", "segmentation": "sequence", "tree_widths": [2, 2], "tree_segment_length": 3}
        run = {**tree, "num_generations": 2, "tree_edges_per_prompt": 2, "beta": 0.0, "steps": 6}

        def make(folder):
            return self.run(family, folder, save_steps=1, **run), folder

        whole, folder = undisturbed(f"{family.name} trees", make)
        parts = self.run(family, tmp_path, resume=folder / f"checkpoint-{step}", save_strategy="no", **run)
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


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)


def warnings_in(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("sapo_trl")]


class TestLogOfAResumedRun:
    """Rollouts of four optimizer steps; it is resumed in the middle of one, or of the steps that an entry averages."""

    def run(self, family, folder, resume=None, **overrides):
        def reward(completion_ids, log_extra, log_metric, **kwargs):
            log_extra("place", list(range(len(completion_ids))))
            log_metric("longest", float(max(map(len, completion_ids))))
            return length_reward(completion_ids)

        settings = {
            "max_steps": 8,
            "num_mini_batches": 4,
            "per_device_train_batch_size": 1,
            "learning_rate": 0.02,
            "critic_learning_rate": 0.02,
            "save_strategy": "steps",
            "save_steps": 1,
            "log_completions": True,
            **overrides,
        }
        callback = SegmentationCallback(folder / "segments", every=settings.pop("every", 1))
        trainer = sapo_trainer(
            family, folder, trainer_kwargs={"callbacks": [callback], "reward_funcs": reward}, **settings
        )
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer

    @staticmethod
    def without_times(entry: dict) -> dict:
        return {name: value for name, value in entry.items() if "time" not in name and "per_second" not in name}

    def tables(self, folder, pattern: str) -> dict[str, list[dict]]:
        """What files hold, each row with plain lists."""
        return {
            path.name: json.loads(pd.read_parquet(path).to_json(orient="records"))
            for path in sorted(folder.glob(pattern))
        }

    @TEXT_FAMILY
    @pytest.mark.parametrize("every", [1, 3])
    def test_it_equals_an_undisturbed_runs(self, family, every, tmp_path):
        whole = self.run(family, tmp_path / "whole", logging_steps=every)
        entries = [self.without_times(entry) for entry in whole.state.log_history]
        assert len(entries) == 8 // every + 1 and len(entries[0]) >= 50
        for step in (2, 5) if every == 3 else (3,):
            folder = tmp_path / f"parts{step}"
            parts = self.run(family, folder, tmp_path / "whole" / f"checkpoint-{step}", logging_steps=every)
            resumed = [self.without_times(entry) for entry in parts.state.log_history]
            mean_losses = [entry.pop("train_loss") for entry in (resumed[-1], dict(entries[-1]))]
            assert mean_losses[0] != mean_losses[1]  # of the steps that each of them has run
            assert resumed == [*entries[:-1], {k: v for k, v in entries[-1].items() if k != "train_loss"}]
            for pattern in ("segments/ratios_*", "completions/*"):
                written, expected = self.tables(folder, pattern), self.tables(tmp_path / "whole", pattern)
                assert written and written == {name: expected[name] for name in written}
            # In the middle of the first rollout, whose ratios are known after its last step, or of the second.
            assert len(self.tables(folder, "segments/ratios_*")) == (2 if step < 4 else 1)
            assert all(len(rows) == 4 for rows in self.tables(folder, "completions/*").values())

    @TEXT_FAMILY
    def test_its_mean_loss_is_of_the_steps_that_it_has_run(self, family, tmp_path):
        whole = self.run(family, tmp_path / "whole", logging_steps=1)
        parts = self.run(family, tmp_path / "parts", tmp_path / "whole" / "checkpoint-2", logging_steps=5)
        expected = sum(logged(whole, "loss")[2:]) / 6
        assert parts.state.log_history[-1]["train_loss"] == pytest.approx(expected, abs=1e-6)

    @TEXT_FAMILY
    def test_every_other_rollout_is_every_other_of_the_whole_run(self, family, tmp_path):
        settings = {"every": 2, "num_mini_batches": 1, "max_steps": 5}
        self.run(family, tmp_path / "whole", **settings)
        self.run(family, tmp_path / "parts", tmp_path / "whole" / "checkpoint-1", **settings)
        recorded = sorted(path.name for path in (tmp_path / "parts" / "segments").glob("segments_*"))
        assert recorded == ["segments_000002_000.parquet", "segments_000004_000.parquet"]

    @TEXT_FAMILY
    def test_callbacks_of_ones_own_have_a_state(self, family, tmp_path, caplog):
        class Counter(RolloutCallback):
            def __init__(self, extra=None):
                self.counts, self.extra = [0], extra

            def on_rollout(self, args, state, control, rollout, metrics):
                self.counts.append(self.counts[-1] + 1)

            def state_dict(self):
                return {"counts": self.counts, "extra": self.extra}

            def load_state_dict(self, state):
                self.counts = state["counts"]

        def run(folder, counters, resume=None):
            settings = {"max_steps": 3, "num_mini_batches": 1, "save_strategy": "steps", "save_steps": 2}
            trainer = sapo_trainer(family, folder, trainer_kwargs={"callbacks": counters}, **settings)
            trainer.train(resume_from_checkpoint=resume and str(resume))

        run(tmp_path, [Counter(), Counter(extra={1, 2})])
        assert "callback Counter: A value of type set cannot be written" in warnings_in(caplog)[-1]
        counter = Counter()
        run(tmp_path / "parts", [counter], tmp_path / "checkpoint-2")
        assert counter.counts == [0, 1, 2, 3]


class TestChangedSettings:
    def run(self, family, folder, resume=None, **overrides):
        settings = {
            "max_steps": 6,
            "lr_scheduler_type": "linear",
            "learning_rate": 0.02,
            "critic_learning_rate": 0.04,
            "save_strategy": "steps",
            "save_steps": 2,
            **overrides,
        }
        trainer = sapo_trainer(family, folder, **settings)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer

    @TEXT_FAMILY
    def test_learning_rates_are_those_of_the_new_settings(self, family, tmp_path, caplog):
        self.run(family, tmp_path)
        changed = {"learning_rate": 0.005, "critic_learning_rate": 0.01}
        resumed = self.run(family, tmp_path / "parts", tmp_path / "checkpoint-2", **changed)
        assert logged(resumed, "learning_rate")[2:] == pytest.approx([0.005 * (1 - step / 6) for step in range(2, 6)])
        assert logged(resumed, "critic/learning_rate")[2:] == pytest.approx(
            [0.01 * (1 - step / 6) for step in range(2, 6)]
        )
        said = [text for text in warnings_in(caplog) if "The new ones apply" in text]
        assert len(said) == 2
        assert "policy's" in said[0] and said[0].endswith("learning rate 0.02 → 0.005.")
        assert "critic's" in said[1] and said[1].endswith("learning rate 0.04 → 0.01.")

    @TEXT_FAMILY
    def test_a_longer_run_has_its_own_schedule(self, family, tmp_path):
        self.run(family, tmp_path, max_steps=4)
        resumed = self.run(family, tmp_path / "parts", tmp_path / "checkpoint-4", max_steps=8)
        expected = [*(1 - step / 4 for step in range(4)), *(1 - step / 8 for step in range(4, 8))]
        assert logged(resumed, "learning_rate") == pytest.approx([0.02 * share for share in expected])
        assert logged(resumed, "critic/learning_rate") == pytest.approx([0.04 * share for share in expected])

    @TEXT_FAMILY
    def test_weight_decay_and_betas(self, family, tmp_path):
        self.run(family, tmp_path)
        changed = {"weight_decay": 0.5, "adam_beta1": 0.5}
        resumed = self.run(family, tmp_path / "parts", tmp_path / "checkpoint-2", **changed)
        for optimizer in (resumed.optimizer, resumed.critic.optimizer):
            assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.5}
            assert {group["betas"][0] for group in optimizer.param_groups} == {0.5}

    @TEXT_FAMILY
    def test_an_optimizer_of_another_kind_is_refused(self, family, tmp_path):
        self.run(family, tmp_path, max_steps=2)
        with pytest.raises(ValueError, match="policy's optimizer in the checkpoint is of another kind .*'dampening'"):
            self.run(family, tmp_path / "parts", tmp_path / "checkpoint-2", optim="sgd")

    @TEXT_FAMILY
    def test_when_to_log_and_to_save(self, family, tmp_path):
        self.run(family, tmp_path)
        folder = tmp_path / "parts"
        resumed = self.run(family, folder, tmp_path / "checkpoint-2", logging_steps=2, save_steps=1)
        assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 4, 6]
        assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (3, 4, 5, 6)}


class TestMissingState:
    """What begins anew is said."""

    def resume(self, family, folder, caplog, missing=(), before=None, **overrides) -> list[str]:
        settings = {"save_strategy": "steps", "save_steps": 1, "num_mini_batches": 2}
        sapo_trainer(family, folder, max_steps=1, **{**settings, **(before or {})}).train()
        for name in missing:
            (folder / "checkpoint-1" / name).unlink()
        caplog.clear()
        trainer = sapo_trainer(family, folder, max_steps=2, **{**settings, **overrides})
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 2
        return warnings_in(caplog)

    @TEXT_FAMILY
    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("critic_optimizer.pt", "the critic's optimizer and learning rate schedule (critic_optimizer.pt)"),
            ("process_state_0.pt", "the rollout, and the measurements since the last log entry (process_state_0.pt)"),
            ("optimizer.pt", "the policy's optimizer and learning rate schedule (optimizer.pt, scheduler.pt)"),
            ("rng_state.pth", "the random numbers (rng_state.pth)"),
        ],
    )
    def test_a_missing_file(self, family, name, said, tmp_path, caplog):
        (warning,) = self.resume(family, tmp_path, caplog, [name])
        assert str(tmp_path / "checkpoint-1") in warning
        assert warning.endswith(f"These begin anew: {said}.")

    @TEXT_FAMILY
    def test_save_only_model(self, family, tmp_path, caplog):
        warmup = {"critic_warmup_steps": 1, "critic_warmup_tolerance": 0.1}
        (warning,) = self.resume(family, tmp_path, caplog, before={"save_only_model": True}, **warmup)
        names = ["optimizer.pt", "critic_optimizer.pt", "critic_warmup.json", "process_state_0.pt", "rng_state.pth"]
        assert [warning.count(f"({name}") for name in names] == [1] * 5

    @TEXT_FAMILY
    def test_a_run_without_the_critic_that_is_there(self, family, tmp_path, caplog):
        without = {"critic": "none", "advantage_estimator": "batch"}
        (warning,) = self.resume(family, tmp_path, caplog, **without)
        assert "holds a critic, which critic='none' does not use" in warning

    @TEXT_FAMILY
    def test_a_complete_checkpoint_is_not_worth_a_word(self, family, tmp_path, caplog):
        assert self.resume(family, tmp_path, caplog) == []


class TestNewestCheckpoint:
    @TEXT_FAMILY
    def test_of_two_branches_it_is_that_of_the_later_one(self, family, tmp_path):
        def train(steps, resume=None, **overrides):
            settings = {"save_strategy": "steps", "save_steps": 1, "critic": "none", "advantage_estimator": "batch"}
            recorder = Recorder()
            trainer = sapo_trainer(
                family,
                tmp_path,
                max_steps=steps,
                num_mini_batches=1,
                trainer_kwargs={"callbacks": [recorder]},
                **settings,
                **overrides,
            )
            trainer.train(resume_from_checkpoint=resume)
            return trainer, recorder

        train(4)
        branch, _ = train(3, str(tmp_path / "checkpoint-1"), learning_rate=0.01)
        again, recorder = train(4, True, learning_rate=0.0)
        assert recorder.steps == [3]
        expected = state_of(branch.model)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(again.model).items())

    @TEXT_FAMILY
    def test_where_there_is_none(self, family, tmp_path):
        (tmp_path / "checkpoint-3").mkdir()
        with pytest.raises(ValueError, match="holds no complete checkpoint"):
            sapo_trainer(family, tmp_path).train(resume_from_checkpoint=True)

    @TEXT_FAMILY
    def test_a_damaged_one_is_refused_before_training(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path, save_strategy="steps", save_steps=1)
        trainer.train()
        state = tmp_path / "checkpoint-2" / "critic_optimizer.pt"
        state.write_bytes(state.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"checkpoint-2/critic_optimizer.pt' is damaged .*Resume from .*-1'"):
            sapo_trainer(family, tmp_path).train(resume_from_checkpoint=True)

    @TEXT_FAMILY
    @pytest.mark.parametrize(("name", "whose"), [("model", "policy"), ("critic/model", "critic")])
    def test_weights_that_are_no_numbers_are_refused_before_training(self, family, name, whose, tmp_path):
        sapo_trainer(family, tmp_path, save_strategy="steps").train()
        path = tmp_path / "checkpoint-2" / f"{name}.safetensors"
        weights = load_file(path)
        next(iter(weights.values())).view(-1)[0] = torch.nan
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"The {whose} in '.*checkpoint-2' has 1 of .* that are NaN"):
            sapo_trainer(family, tmp_path, max_steps=3).train(resume_from_checkpoint=True)


class TestBestModel:
    def run(self, family, folder, steps, resume=None):
        """Of three steps' checkpoints the first is the best."""
        trainer = sapo_trainer(
            family,
            folder,
            max_steps=steps,
            num_mini_batches=1,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=4,
            load_best_model_at_end=True,
            metric_for_best_model="eval_reward",  # the same each time, with fixed completions
            greater_is_better=True,
            trainer_kwargs={"eval_dataset": family.dataset(4), "rollout_func": fixed_rollout(random_completions(5))},
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def check(self, trainer, folder):
        assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-1")
        best = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-1").state_dict()
        assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())
        best = SegmentValueHead.from_pretrained(folder / "checkpoint-1" / "critic").state_dict()
        assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.critic.value_head.state_dict().items())

    @TEXT_FAMILY
    @pytest.mark.parametrize("steps", [2, 3])  # two steps are an epoch
    def test_a_run_that_is_resumed_at_its_last_step_ends_with_it(self, family, steps, tmp_path):
        self.run(family, tmp_path, steps)
        self.check(self.run(family, tmp_path, steps, resume=True), tmp_path)

    @TEXT_FAMILY
    def test_in_a_moved_folder(self, family, tmp_path, caplog):
        self.run(family, tmp_path / "before", 2)
        shutil.move(tmp_path / "before", tmp_path / "after")
        self.check(self.run(family, tmp_path / "after", 3, resume=True), tmp_path / "after")
        assert "does not exist anymore" not in caplog.text

    @TEXT_FAMILY
    def test_where_it_is_gone_that_is_said(self, family, tmp_path, caplog):
        self.run(family, tmp_path, 2)
        shutil.rmtree(tmp_path / "checkpoint-1")
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            self.run(family, tmp_path, 3, resume=True)
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
        assert "checkpoint-1 recorded in the resumed state does not exist anymore" in caplog.text
