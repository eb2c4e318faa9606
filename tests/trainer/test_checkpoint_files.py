"""Which checkpoint is the newest, which ones go, and that none is ever half there."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sapo_trl import run_folder
from sapo_trl.recordings.log import read_log_history
from sapo_trl.run_folder import complete_checkpoints, newest_checkpoint
from sapo_trl.trainer import checkpoint_files
from sapo_trl.trainer.checkpoint_files import (
    STAGING_FOLDER,
    check_checkpoint,
    publish,
    recorded_best,
    rotate,
    staging_folder,
    write_error,
)


def write(folder: Path, content: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / TRAINER_STATE_NAME).write_text(json.dumps({"best_model_checkpoint": None}))
    (folder / "weights").write_text(content)
    return folder


def write_and_publish(run: Path, step: int, content: str = "") -> Path:
    return publish(write(staging_folder(run) / f"checkpoint-{step}", content), run)


def names(run: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(run)]


class TestOrder:
    def test_names_are_those_of_transformers(self):
        assert run_folder.TRAINER_STATE_NAME == TRAINER_STATE_NAME
        assert run_folder.CHECKPOINT_PREFIX == PREFIX_CHECKPOINT_DIR

    def test_of_publication_whatever_steps_and_clocks_say(self, tmp_path):
        for step in (1, 2, 10, 3):
            write_and_publish(tmp_path, step)
        for age, step in enumerate((3, 10, 1, 2)):
            os.utime(tmp_path / f"checkpoint-{step}", (age, age))
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-10", "checkpoint-3"]
        write_and_publish(tmp_path, 1, "replaced")
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-10", "checkpoint-3", "checkpoint-1"]
        assert (newest_checkpoint(tmp_path) / "weights").read_text() == "replaced"

    def test_a_log_is_read_from_the_newest(self, tmp_path):
        for step in (1, 4, 3):
            checkpoint = write_and_publish(tmp_path, step)
            (checkpoint / TRAINER_STATE_NAME).write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}]}))
        assert read_log_history(tmp_path)["step"].tolist() == [3]

    def test_checkpoints_of_other_trainers_come_first_by_their_steps(self, tmp_path):
        for step in (10, 9):
            write(tmp_path / f"checkpoint-{step}")
        write_and_publish(tmp_path, 3)
        assert names(tmp_path) == ["checkpoint-9", "checkpoint-10", "checkpoint-3"]

    def test_what_is_incomplete_is_none(self, tmp_path):
        assert newest_checkpoint(tmp_path / "not there") is None
        (tmp_path / "checkpoint-3").mkdir()
        (tmp_path / "checkpoint-3" / "weights").touch()
        write(tmp_path / "checkpoint-4.bak")
        write(tmp_path / "checkpoint-four")
        assert newest_checkpoint(tmp_path) is None

    def test_a_damaged_number_is_named(self, tmp_path):
        (write(tmp_path / "checkpoint-1") / "publication.json").write_text("{")
        with pytest.raises(ValueError, match=r"checkpoint-1/publication.json' is damaged"):
            newest_checkpoint(tmp_path)


class TestRotation:
    @settings(max_examples=30, deadline=None)
    @given(
        steps=st.lists(st.integers(1, 5), min_size=1, max_size=8),
        limit=st.none() | st.integers(1, 4),
        best=st.none() | st.integers(1, 6),
    )
    def test_keeps_the_newest_and_the_best(self, steps, limit, best):
        with tempfile.TemporaryDirectory() as folder:
            run, expected = Path(folder), []
            for step in steps:
                write_and_publish(run, step)
                rotate(run, limit, None if best is None else run / f"checkpoint-{best}")
                expected = [other for other in expected if other != step] + [step]
                while limit is not None and len(expected) > limit:
                    oldest = next((other for other in expected[:-1] if other != best), None)
                    if oldest is None:
                        break
                    expected.remove(oldest)
                assert names(run) == [f"checkpoint-{step}" for step in expected]
                assert not (run / STAGING_FOLDER).exists()

    def test_only_complete_ones_count(self, tmp_path):
        (tmp_path / "checkpoint-9").mkdir()  # left by a deletion of an earlier version
        for step in (1, 2, 3):
            write_and_publish(tmp_path, step)
        rotate(tmp_path, 2)
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]

    @pytest.mark.parametrize("survived", range(3))
    def test_killed_in_the_middle_it_leaves_nothing_that_looks_like_a_checkpoint(
        self, survived, tmp_path, monkeypatch
    ):
        for step in (1, 2):
            write_and_publish(tmp_path, step)
        unlink, left = os.unlink, [survived]

        def unlink_until_killed(*args, **kwargs):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            unlink(*args, **kwargs)

        monkeypatch.setattr(os, "unlink", unlink_until_killed)
        with pytest.raises(KeyboardInterrupt):
            rotate(tmp_path, 1)
        monkeypatch.undo()
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
        write_and_publish(tmp_path, 3)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_else_of_the_staging_folders_name_makes_way(kind, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
    (other / "kept").write_text("of someone else")
    if kind == "file":
        (run / STAGING_FOLDER).write_text("")
    else:
        (run / STAGING_FOLDER).symlink_to(other)
    write_and_publish(run, 1)
    assert names(run) == ["checkpoint-1"]
    assert (other / "kept").read_text() == "of someone else"


def test_killed_while_it_replaces_a_checkpoint_it_loses_none(tmp_path, monkeypatch):
    write_and_publish(tmp_path, 1, "old")
    rename, renamed = os.rename, []

    def rename_once(*args):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(args)
        rename(*args)

    staged = write(staging_folder(tmp_path) / "checkpoint-1", "new")
    monkeypatch.setattr(os, "rename", rename_once)
    with pytest.raises(KeyboardInterrupt):
        publish(staged, tmp_path)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path) is None  # the old one has been moved away
    checkpoint_files.finish_publication(tmp_path)
    assert (newest_checkpoint(tmp_path) / "weights").read_text() == "new"
    staging_folder(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


class TestBest:
    def state(self, checkpoint: Path, best: Path) -> Path:
        (checkpoint / TRAINER_STATE_NAME).write_text(json.dumps({"best_model_checkpoint": str(best)}))
        return checkpoint

    def test_in_a_moved_a_copied_and_an_unmoved_folder(self, tmp_path):
        best = write(tmp_path / "run" / "checkpoint-1")
        last = self.state(write(tmp_path / "run" / "checkpoint-2"), best)
        assert recorded_best(last) == str(best)
        copied = Path(shutil.copytree(tmp_path / "run", tmp_path / "copied"))
        assert recorded_best(copied / "checkpoint-2") == str(copied / "checkpoint-1")
        elsewhere = self.state(write(tmp_path / "next" / "checkpoint-3"), best)
        assert recorded_best(elsewhere) == str(best)
        shutil.rmtree(best)
        assert recorded_best(last) is None
        assert recorded_best(write(tmp_path / "run" / "checkpoint-4")) is None  # never was one


class TestDamage:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        folder = write(tmp_path / "checkpoint-2")
        (folder / "critic_warmup.json").write_text("{}")
        (folder / "config.json").write_text("{}")
        torch.save({"state": {0: torch.zeros(100)}}, folder / "optimizer.pt")
        torch.save({"optimizer": torch.zeros(100), "scheduler": None, "scaler": {}}, folder / "critic_optimizer.pt")
        torch.save({"num_processes": 1, "step": 2}, folder / "process_state_0.pt")
        (folder / "critic").mkdir()
        save_file({"weight": torch.zeros(100)}, folder / "critic" / "model.safetensors")
        return folder

    def test_sound_files_pass(self, checkpoint):
        check_checkpoint(checkpoint)

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
    @pytest.mark.parametrize(
        "name",
        [
            TRAINER_STATE_NAME,
            "critic_warmup.json",
            "optimizer.pt",
            "critic_optimizer.pt",
            "process_state_0.pt",
            "config.json",
            "critic/model.safetensors",
        ],
    )
    def test_a_file_that_is_cut_off_is_named(self, checkpoint, name, share):
        write(checkpoint.parent / "checkpoint-1")
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError) as error:
            check_checkpoint(checkpoint)
        message = str(error.value)
        assert message.startswith(f"{str(checkpoint / name)!r} is damaged (")
        assert message.endswith(f"Resume from {str(checkpoint.parent / 'checkpoint-1')!r}.")
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("name", "content", "problem"),
        [
            ("process_state_0.pt", {"num_processes": 1}, "it has no 'step'"),
            ("process_state_0.pt", [1, 2], "it holds a list"),
            ("critic_optimizer.pt", {"optimizer": {}}, "it has no 'scheduler'"),
            ("critic_optimizer.pt", {"optimizer": Path("x")}, "UnpicklingError"),
        ],
    )
    def test_a_file_that_lacks_something_is_named(self, checkpoint, name, content, problem):
        torch.save(content, checkpoint / name)
        with pytest.raises(ValueError) as error:
            check_checkpoint(checkpoint)
        assert str(error.value).startswith(f"{str(checkpoint / name)!r} is damaged ({problem}")
        assert str(error.value).endswith("Begin anew from the model.")


def test_errors_that_are_not_about_writing_are_told_apart(tmp_path):
    assert write_error(OSError(errno.EDQUOT, "quota"), tmp_path) == errno.EDQUOT
    assert write_error(RuntimeError("CUDA error"), tmp_path) is None
    assert write_error(KeyError("x"), tmp_path) is None
