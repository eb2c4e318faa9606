"""`SegmentationCallback`: what it logs and what it writes."""

import json
import random
import resource

import pandas as pd
import pytest
import torch
from PIL import Image

from sapo_trl import SegmentationCallback
from sapo_trl.callbacks import RolloutCallback
from sapo_trl.data import to_prompts
from sapo_trl.embedded import make_problems
from sapo_trl.recordings import segmented_responses
from sapo_trl.recordings.writing import write_rows
from tests.strategies import token_lists
from tests.testing_utils import (
    Recorder,
    WeightRecorder,
    fixed_rollout,
    length_reward,
    logged,
    random_completions,
    sapo_trainer,
)


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
        assert sorted(path.name for path in folder.glob("segments_*")) == names
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
                assert list(row["special"]) == [
                    token in family.tokenizer.all_special_ids for token in completion.tolist()
                ]
                assert list(row["masked_tokens"]) == list(row["masked_positions"]) == []
                assert list(row["segment_ids"]) == rollout.segments.ids[index, :length].tolist()
                for column in ("logps", "entropies", "values", "advantages", "returns"):
                    expected = getattr(rollout, column)[index, :length].tolist()
                    assert list(row[column]) == pytest.approx(expected)

    @TEXT_FAMILY
    def test_every_and_max_responses(self, family, tmp_path):
        callback = SegmentationCallback(tmp_path / "segments", every=2, max_responses=3)
        run(family, tmp_path / "run", [callback], max_steps=6)
        files = sorted((tmp_path / "segments").glob("segments_*"))
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
        # What no segment has is kept apart, with its place.
        assert scored["masked_tokens"] == [family.tokenizer.decode([31])] and scored["masked_positions"] == [1]
        texts = [family.tokenizer.decode([token]) for token in (30, 31, 32, 33)]
        assert unscored["masked_tokens"] == texts and unscored["masked_positions"] == [0] * 4

    @TEXT_FAMILY
    def test_special_tokens_are_marked(self, family, tmp_path):
        end = family.tokenizer.eos_token_id
        rollout = fixed_rollout(lambda prompts, _: [[30, end]] * len(prompts))
        trainer = sapo_trainer(
            family,
            tmp_path / "run",
            trainer_kwargs={"callbacks": [SegmentationCallback(tmp_path / "segments")], "rollout_func": rollout},
        )
        trainer.train()
        for row in self.read(tmp_path / "segments" / "segments_000000_000.parquet"):
            assert list(row["special"]) == [False, True]

    @pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
    def test_images_are_written_once(self, family, tmp_path):
        folder = tmp_path / "segments"
        problems = make_problems(4)
        trainer = sapo_trainer(
            family,
            tmp_path / "run",
            max_steps=6,
            trainer_kwargs={
                "callbacks": [SegmentationCallback(folder, image_size=20)],
                "rollout_func": fixed_rollout(random_completions(5)),
                "train_dataset": to_prompts(problems),
            },
        )
        trainer.train()
        # Three rollouts of four responses, to four prompts.
        named = [name for path in folder.glob("segments_*") for row in self.read(path) for name in row["images"]]
        assert len(named) == 12 and len(set(named)) == 4
        assert {path.name for path in (folder / "images").iterdir()} == set(named)
        shrunk = []
        for problem in problems:
            image = problem["images"][0].convert("RGB")
            image.thumbnail((20, 20))
            shrunk.append(image.tobytes())
        assert sorted(Image.open(folder / "images" / name).tobytes() for name in set(named)) == sorted(shrunk)

    @TEXT_FAMILY
    def test_ratios_are_those_of_the_update(self, family, tmp_path):
        recorder, weights, folder = Recorder(), WeightRecorder(), tmp_path / "segments"
        trainer = sapo_trainer(
            family,
            tmp_path / "run",
            trainer_kwargs={
                "callbacks": [recorder, weights, SegmentationCallback(folder, max_responses=3)],
                "rollout_func": fixed_rollout(random_completions(5)),
            },
        )
        weights.modules = [trainer.model]
        trainer.train()
        # Two optimizer steps: a response was seen by the policy of the first or by that of the second.
        before, after_one_step = family.build_model().eval(), family.build_model().eval()
        missing, unexpected = after_one_step.load_state_dict(weights.states[0][0], strict=False)
        assert not unexpected and len(missing) <= 1  # a tied head is no parameter of its own
        rollout = recorder.rollouts[0]
        rows = self.read(folder / "ratios_000000_000.parquet")
        assert [row["response"] for row in rows] == [0, 1, 2]
        moved = 0
        for index, row in enumerate(rows):
            length = int(rollout.segments.mask[index].sum())
            prompt = rollout.prompt_ids[index][rollout.prompt_mask[index].bool()]
            ids = torch.cat([prompt, rollout.completion_ids[index, :length]])
            differences = []
            for model in (before, after_one_step):
                with torch.no_grad():
                    logps = model(ids[None]).logits[0].log_softmax(-1)
                taken = logps[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None]).squeeze(1)
                differences.append(taken - rollout.logps[index, :length])
            recorded = torch.tensor(row["log_ratios"], dtype=torch.float32)
            expected = differences[0] if recorded.abs().max() < 1e-4 else differences[1]
            moved += recorded.abs().max() > 1e-4
            torch.testing.assert_close(recorded, expected, atol=1e-4, rtol=1e-4)
        assert 1 <= moved <= 2  # each step has two of the four responses

    @TEXT_FAMILY
    def test_without_an_update_no_ratios(self, family, tmp_path):
        # TRL's loss does not tell its log-probabilities.
        run(
            family,
            tmp_path / "run",
            [SegmentationCallback(tmp_path / "segments")],
            loss_type="grpo",
            importance_sampling_level="token",
            beta=0.0,
        )
        assert not list((tmp_path / "segments").glob("ratios_*"))

    def test_bad_arguments_are_named(self):
        with pytest.raises(ValueError, match='`file_format` must be "parquet" or "json", got \'csv\''):
            SegmentationCallback("x", file_format="csv")
        with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
            SegmentationCallback("x", every=0)
        with pytest.raises(ValueError, match="`max_responses` must be at least 1, got 0"):
            SegmentationCallback("x", max_responses=0)
        with pytest.raises(ValueError, match="`image_size` must be at least 1, got 0"):
            SegmentationCallback("x", image_size=0)

    @pytest.mark.parametrize("file_format", ["parquet", "json"])
    def test_a_file_is_complete_or_not_there(self, file_format, tmp_path):
        """A limit for the size of files ends the writing in the middle, as a kill or a full disk does."""
        path = tmp_path / f"segments_000000_000.{file_format}"
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        for content in ([], [{"step": 1}]):
            if content:
                write_rows(path, content)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
            try:
                with pytest.raises(OSError):
                    write_rows(path, [{"tokens": random.Random(row).randbytes(500).hex()} for row in range(2000)])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert [file.name for file in tmp_path.iterdir()] == [path.name] * bool(content)
        assert self.read(path) == [{"step": 1}]
