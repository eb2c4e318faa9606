"""`SegmentationCallback`: what it logs and what it writes."""

import json

import pandas as pd
import pytest
import torch

from sapo_trl import SegmentationCallback
from sapo_trl.callbacks import RolloutCallback, segmented_responses

from .strategies import token_lists
from .testing_utils import Recorder, fixed_rollout, length_reward, logged, random_completions, sapo_trainer


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
BOTH_FAMILIES = pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)


def run(family, folder, callbacks, **overrides):
    trainer = sapo_trainer(
        family,
        folder,
        **{"max_steps": 4, **overrides},
        trainer_kwargs={"callbacks": callbacks, "rollout_func": fixed_rollout(random_completions(5))},
    )
    trainer.train()
    return trainer


class TestLogging:
    @BOTH_FAMILIES
    def test_logged_means_equal_loops_over_the_rollout(self, family, tmp_path):
        recorder = Recorder()
        trainer = run(family, tmp_path, [recorder])  # the trainer adds the callback itself
        names = ["count", "length", "max_length", "single_token_share", "entropy_at_cuts", "value_change_at_cuts"]
        for index, rollout in enumerate(recorder.rollouts):
            rows = token_lists(rollout.segments)
            segments = [(row, part) for row, parts in enumerate(rows) for part in parts]
            lengths = [len(part) for _, part in segments]
            changes = [
                abs(rollout.values[row, after[0]] - rollout.values[row, part[-1]]).item()
                for row, parts in enumerate(rows)
                for part, after in zip(parts, parts[1:], strict=False)
            ]
            cuts = [rollout.entropies[row, part[-1]].item() for row, part in segments]
            expected = {
                "count": len(segments) / len(rows),
                "length": sum(lengths) / len(lengths),
                "max_length": max(lengths),
                "single_token_share": lengths.count(1) / len(lengths),
                "entropy_at_cuts": sum(cuts) / len(cuts),
                "value_change_at_cuts": sum(changes) / len(changes),
            }
            ours = {name: logged(trainer, f"segments/{name}")[index] for name in names}
            assert ours == pytest.approx(expected, abs=1e-5)

    @TEXT_FAMILY
    def test_added_once(self, family, tmp_path):
        for callbacks, number in (([], 1), ([SegmentationCallback()], 1), ([Recorder()], 1)):
            trainer = sapo_trainer(family, tmp_path, trainer_kwargs={"callbacks": callbacks})
            ours = [c for c in trainer.callback_handler.callbacks if isinstance(c, SegmentationCallback)]
            assert len(ours) == number

    @TEXT_FAMILY
    def test_without_critic_no_value_changes(self, family, tmp_path):
        trainer = run(family, tmp_path, [], critic="none")
        assert "segments/count" in trainer.state.log_history[0]
        assert "segments/value_change_at_cuts" not in trainer.state.log_history[0]

    @TEXT_FAMILY
    def test_own_callback_adds_metrics(self, family, tmp_path):
        class Mine(RolloutCallback):
            def on_rollout(self, args, state, control, rollout, metrics):
                metrics.add_mean("mine", torch.tensor(float(state.global_step)))

        assert logged(run(family, tmp_path, [Mine()]), "mine") == [0.0, 2.0]


class TestFiles:
    def read(self, path):
        if path.suffix == ".parquet":
            return pd.read_parquet(path).to_dict("records")
        return [json.loads(line) for line in path.read_text().splitlines()]

    @BOTH_FAMILIES
    @pytest.mark.parametrize("file_format", ["parquet", "json"])
    def test_segmented_responses(self, family, file_format, tmp_path):
        recorder, folder = Recorder(), tmp_path / "new" / "segments"
        run(family, tmp_path / "run", [recorder, SegmentationCallback(folder, file_format)])
        names = [f"segments_{step:06d}_000.{file_format}" for step in (0, 2)]
        assert sorted(path.name for path in folder.iterdir()) == names
        for name, rollout, step in zip(names, recorder.rollouts, (0, 2), strict=True):
            rows = self.read(folder / name)
            assert len(rows) == 4
            for index, row in enumerate(rows):
                length = int(rollout.segments.mask[index].sum())
                completion = rollout.completion_ids[index, :length]
                assert row["step"] == step
                assert row["reward"] == pytest.approx(length_reward([completion.tolist()])[0])
                assert "<|im_start|>user" in row["prompt"] and "<|endoftext|>" not in row["prompt"]
                assert list(row["tokens"]) == [family.tokenizer.decode([token]) for token in completion.tolist()]
                assert list(row["segment_ids"]) == rollout.segments.ids[index, :length].tolist()
                for column in ("logps", "entropies", "values", "advantages", "returns"):
                    expected = getattr(rollout, column)[index, :length].tolist()
                    assert list(row[column]) == pytest.approx(expected)

    @TEXT_FAMILY
    def test_every_and_max_responses(self, family, tmp_path):
        callback = SegmentationCallback(tmp_path / "segments", every=2, max_responses=3)
        run(family, tmp_path / "run", [callback], max_steps=6)
        files = sorted((tmp_path / "segments").iterdir())
        assert [path.name for path in files] == ["segments_000000_000.parquet", "segments_000004_000.parquet"]
        assert [len(self.read(path)) for path in files] == [3, 3]

    @TEXT_FAMILY
    def test_evaluation_is_not_written(self, family, tmp_path):
        trainer = sapo_trainer(
            family,
            tmp_path / "run",
            per_device_eval_batch_size=4,
            trainer_kwargs={
                "callbacks": [SegmentationCallback(tmp_path / "segments")],
                "eval_dataset": family.dataset(4),
            },
        )
        trainer.evaluate()
        assert not (tmp_path / "segments").exists()
        assert "eval_segments/count" in trainer.state.log_history[-1]

    @TEXT_FAMILY
    def test_holes_and_unscored_responses(self, family, tmp_path):
        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            trainer_kwargs={
                "callbacks": [recorder],
                "reward_funcs": lambda completions, **kwargs: [None, 1.0, 1.0, 1.0],
                "rollout_func": fixed_rollout(
                    lambda prompts, _: [[30, 31, 32, 33]] * len(prompts),
                    env_mask=lambda prompts, completions: [[1, 0, 1, 1]] * len(prompts),
                ),
            },
        )
        trainer.train()
        unscored, scored, *_ = segmented_responses(recorder.rollouts[0], step=0)
        assert unscored["reward"] is None and unscored["tokens"] == [] and unscored["values"] == []
        assert scored["reward"] == 1.0
        assert scored["tokens"] == [family.tokenizer.decode([token]) for token in (30, 32, 33)]

    def test_bad_arguments_are_named(self):
        with pytest.raises(ValueError, match='`file_format` must be "parquet" or "json", got \'csv\''):
            SegmentationCallback("x", file_format="csv")
        with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
            SegmentationCallback("x", every=0)
        with pytest.raises(ValueError, match="`max_responses` must be at least 1, got 0"):
            SegmentationCallback("x", max_responses=0)
