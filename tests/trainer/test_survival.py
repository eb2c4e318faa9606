"""A run that survives: kills at any moment, signals, full disks, gradients that are not numbers."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from sapo_trl import SAPOConfig, SegmentValueHead
from sapo_trl.folder_lock import FolderInUseError
from sapo_trl.run_folder import PUBLICATION_NAME, complete_checkpoints, newest_checkpoint
from sapo_trl.trainer import checkpoint_files
from sapo_trl.trainer.checkpoint_files import STAGING_FOLDER
from sapo_trl.trainer.checkpoint_parts import Checkpointed
from tests.test_folder_lock import holder
from tests.testing_utils import logged, sapo_trainer, state_of, unmoved


ROOT = Path(__file__).parents[2]
TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
STEPS = 12


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "tests.trainer.killable_run", str(folder), str(STEPS), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
class TestProcesses:
    def test_killed_again_and_again_it_ends_where_an_undisturbed_run_ends(self, tmp_path):
        """Saving at every step, killed at random moments: each checkpoint that is there is complete and right."""
        undisturbed = start(tmp_path / "undisturbed")
        assert undisturbed.wait(timeout=120) == 0, undisturbed.stderr.read()[-3000:]

        rng, folder, kills = random.Random(0), tmp_path / "killed", 0
        while True:
            run = start(folder)
            killed = False
            for line in run.stdout:
                # Some steps after it has begun to train; the moment within a step is left to chance.
                if line.startswith("step") and rng.random() < 0.4:
                    time.sleep(rng.random() * 0.1)
                    run.send_signal(signal.SIGKILL)
                    killed = True
                    break
            run.wait(timeout=120)
            if not killed:
                assert run.returncode == 0, run.stderr.read()[-3000:]
                break
            kills += 1
            assert kills < 60
        assert kills >= 2
        for step in range(1, STEPS + 1):
            checkpoint = folder / f"checkpoint-{step}"
            expected = tmp_path / "undisturbed" / f"checkpoint-{step}"
            files = {path.relative_to(expected) for path in expected.rglob("*") if path.is_file()}
            assert {path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()} == files
        assert not (folder / STAGING_FOLDER).exists()
        one, other = (torch.load(path / "final.pt") for path in (folder, tmp_path / "undisturbed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    def test_sigterm_saves_and_asks_to_be_started_again(self, tmp_path):
        run = start(tmp_path, "--stop-on-signal")
        for line in run.stdout:
            if line.startswith("step 3"):
                run.send_signal(signal.SIGTERM)
                break
        assert run.wait(timeout=120) == 75, run.stderr.read()[-3000:]
        last = json.loads((newest_checkpoint(tmp_path) / "trainer_state.json").read_text())
        assert 3 <= last["global_step"] < STEPS
        again = start(tmp_path, "--stop-on-signal")
        assert again.wait(timeout=120) == 0, again.stderr.read()[-3000:]
        assert (tmp_path / f"checkpoint-{STEPS}").is_dir()

    def test_two_runs_do_not_share_a_folder(self, tmp_path):
        """The second one ends with an error that names the first, whose checkpoints are its own."""
        first = start(tmp_path)
        assert any(line.startswith("step") for line in first.stdout)
        first.send_signal(signal.SIGSTOP)  # until the second has had its chance
        second = start(tmp_path)
        output, errors = second.communicate(timeout=120)
        first.send_signal(signal.SIGCONT)
        assert second.returncode != 0 and "step" not in output
        assert f"output_dir={str(tmp_path)!r} is in use: process {first.pid} on" in errors.splitlines()[-1]
        first.communicate(timeout=120)
        assert first.returncode == 0
        assert len(complete_checkpoints(tmp_path)) == STEPS
        final = torch.load(tmp_path / "final.pt")
        policy = AutoModelForCausalLM.from_pretrained(newest_checkpoint(tmp_path)).state_dict()
        critic = SegmentValueHead.from_pretrained(newest_checkpoint(tmp_path) / "critic").state_dict()
        for prefix, state in (("policy", policy), ("critic", critic)):
            assert all(torch.equal(tensor, final[f"{prefix}.{name}"]) for name, tensor in state.items())

    def test_all_processes_of_a_run_end_if_another_run_has_the_folder(self, tmp_path):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["-m", "tests.distributed.distributed_run", str(tmp_path), "qwen2", "4", "{}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with holder(tmp_path) as process:
            ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert ended.returncode != 0
        assert ended.stderr.count(f"is in use: process {process.pid} on") == 2  # once from each


class TestFolder:
    @TEXT_FAMILY
    def test_training_and_saving_wait_for_nobody(self, family, tmp_path):
        trainer = sapo_trainer(family, tmp_path)
        with holder(tmp_path) as process:
            for use in (trainer.train, trainer.save_checkpoint):
                with pytest.raises(FolderInUseError, match=f"is in use: process {process.pid} on"):
                    use()
        assert trainer.state.global_step == 0
        assert [path.name for path in tmp_path.glob("*checkpoint*")] == []
        trainer.train()
        assert trainer.save_checkpoint() == tmp_path / "checkpoint-2"


@contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own with a limited size, which this process may not be allowed to have."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class TestCheckpoints:
    @TEXT_FAMILY
    @pytest.mark.parametrize("room", [20, 60, 100, 180, 260, 320, 380], ids=lambda room: f"{room}kB")
    def test_a_full_disk_leaves_what_was_there(self, family, room, tmp_path):
        """The second checkpoint finds no room: the first is the newest, and training can go on from it."""
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

        class FillUp(TrainerCallback):
            """Leaves so many kB on the disk once there is a checkpoint."""

            def on_save(self, args, state, control, **kwargs):
                if state.global_step == 2:
                    free = shutil.disk_usage(tmp_path).free
                    (tmp_path / "others").write_bytes(bytes(free - room * 1024))

        with small_disk(tmp_path, "4m"):
            trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"callbacks": [FillUp()]}, **settings)
            with pytest.raises(OSError, match=r"the checkpoint of step 4 could not be written .*checkpoint-2: make"):
                trainer.train()
            assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
            assert not (tmp_path / STAGING_FOLDER).exists()
            (tmp_path / "others").unlink()
            resumed = sapo_trainer(family, tmp_path, **settings)
            resumed.train(resume_from_checkpoint=True)
            assert resumed.state.global_step == 4
            assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"

    @TEXT_FAMILY
    def test_an_error_of_another_kind_stays_what_it_is(self, family, tmp_path, monkeypatch):
        trainer = sapo_trainer(family, tmp_path, save_strategy="steps", save_steps=1)

        class Broken(Checkpointed):
            def state(self):
                return {"broken": 1 / 0}

        trainer.checkpoints.parts.append(Broken())
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert not (tmp_path / STAGING_FOLDER).exists()

    @TEXT_FAMILY
    @pytest.mark.parametrize("limit", [1, 2])
    def test_a_clock_that_is_set_back_deletes_no_new_checkpoint(self, family, limit, tmp_path):
        class SetBack(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                age = 10_000 * state.global_step
                os.utime(tmp_path / f"checkpoint-{state.global_step}", (10**9 - age, 10**9 - age))

        trainer = sapo_trainer(
            family,
            tmp_path,
            max_steps=4,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=limit,
            trainer_kwargs={"callbacks": [SetBack()]},
        )
        trainer.train()
        assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"][-limit:]

    @TEXT_FAMILY
    def test_what_is_deleted_never_looks_like_a_checkpoint(self, family, tmp_path, monkeypatch):
        """Looked at whenever a file goes, also at the end of training, when only the best and the newest stay."""
        unlink, broken, seen = os.unlink, set(), 0

        def look_and_unlink(*args, **kwargs):
            nonlocal seen
            unlink(*args, **kwargs)
            for folder in tmp_path.glob("checkpoint-*"):
                seen += 1
                if not (folder / "model.safetensors").is_file() or not (folder / "critic_optimizer.pt").is_file():
                    broken.add(folder.name)

        monkeypatch.setattr(os, "unlink", look_and_unlink)
        trainer = sapo_trainer(
            family,
            tmp_path,
            max_steps=3,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=1,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=4,
            load_best_model_at_end=True,
            metric_for_best_model="eval_reward",
            num_mini_batches=1,
            trainer_kwargs={
                "reward_funcs": lambda completions, **kwargs: [0.5] * len(completions),
                "eval_dataset": family.dataset(4),
            },
        )
        trainer.train()
        assert seen and not broken
        assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3"]

    @TEXT_FAMILY
    def test_old_ones_go_and_the_best_stays(self, family, tmp_path):
        rewards = iter([0.9] * 4 + [0.1] * 100)

        def reward(completions, **kwargs):
            return [next(rewards) if len(completions) == 4 else 0.5 for _ in completions]

        trainer = sapo_trainer(
            family,
            tmp_path,
            max_steps=6,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=4,
            load_best_model_at_end=True,
            metric_for_best_model="eval_reward",
            greater_is_better=True,
            num_mini_batches=1,
            trainer_kwargs={"reward_funcs": reward, "eval_dataset": family.dataset(4)},
        )
        trainer.train()
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-6"]
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
        state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")

    def test_a_checkpoint_of_the_same_name_is_replaced_at_once(self, tmp_path):
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / "old").touch()
        staged = checkpoint_files.staging_folder(tmp_path) / "checkpoint-1"
        staged.mkdir()
        (staged / "new").touch()
        assert checkpoint_files.publish(staged, tmp_path) == tmp_path / "checkpoint-1"
        files = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
        assert files == {"new", PUBLICATION_NAME}
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]

    def test_a_checkpoint_in_the_middle_of_a_step_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="may save between the critic's update and the policy's"):
            SAPOConfig(str(tmp_path), enable_jit_checkpoint=True, use_cpu=True, bf16=False)


class TestSkippedSteps:
    def poisoned(self, family, output_dir, when, **settings):
        """A trainer whose policy or critic loss is not a number in some steps."""
        trainer = sapo_trainer(family, output_dir, max_steps=6, weight_decay=0.1, **settings)
        for name in ("policy_loss", "critic_loss"):
            loss_of = getattr(trainer, name)

            def poisoned(*args, name=name, loss_of=loss_of):
                loss = loss_of(*args)
                return loss * torch.nan if when(name, trainer.state.global_step) else loss

            setattr(trainer, name, poisoned)
        return trainer

    @TEXT_FAMILY
    @pytest.mark.parametrize("bad", ["policy_loss", "critic_loss"])
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_a_bad_step_moves_neither_model(self, family, bad, accumulation, tmp_path):
        trainer = self.poisoned(
            family, tmp_path, lambda name, step: name == bad and step == 3, gradient_accumulation_steps=accumulation
        )
        states = []

        class Keep:
            def __call__(self):
                states.append([state_of(trainer.model), state_of(trainer.critic.value_head)])

        step_end = trainer.callback_handler.on_step_end
        trainer.callback_handler.on_step_end = lambda *args: (Keep()(), step_end(*args))[1]
        trainer.train()
        assert logged(trainer, "skipped_steps") == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
        for before, module in zip(states[2], (trainer.model, trainer.critic.value_head), strict=True):
            after = states[3][0 if module is trainer.model else 1]
            assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
            assert unmoved(after, module) != list(after)  # and goes on
            assert all(parameter.isfinite().all() for parameter in module.parameters())

    @TEXT_FAMILY
    def test_too_many_in_a_row_stop_the_run_and_keep_the_batch(self, family, tmp_path):
        trainer = self.poisoned(
            family, tmp_path, lambda name, step: name == "policy_loss" and step >= 2, max_skipped_steps=3
        )
        with pytest.raises(FloatingPointError, match=r"last 3 optimizer steps \(max_skipped_steps=3\)"):
            trainer.train()
        assert trainer.state.global_step == 4
        (batch,) = torch.load(tmp_path / "skipped_step_4_0.pt", weights_only=True)
        assert {"completion_ids", "advantages", "segment_ids"} <= batch.keys()

    @TEXT_FAMILY
    def test_single_ones_do_not_add_up(self, family, tmp_path):
        trainer = self.poisoned(
            family, tmp_path, lambda name, step: name == "policy_loss" and step % 2 == 0, max_skipped_steps=2
        )
        trainer.train()
        assert sum(logged(trainer, "skipped_steps")) == 3
        assert all(math.isfinite(loss) for loss in logged(trainer, "critic/loss"))
