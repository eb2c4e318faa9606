"""Parts of a rollout that recordings read, of real runs: against plain loops over tokens."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sapo_trl import SegmentationCallback
from sapo_trl.data import to_prompts
from sapo_trl.embedded import make_problems
from tests.strategies import token_lists
from tests.testing_utils import Recorder, fixed_rollout, length_reward, random_completions, sapo_trainer


TEXT = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
PICTURES = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)


def first_letter(completions, **kwargs):
    return [None if place == 1 else 0.5 * place for place in range(len(completions))]


def questions(family):
    if family.name != "qwen2":
        return to_prompts(make_problems(4))
    return family.dataset(4).remove_columns("answer").add_column("answer", ["a", "b", "c", "d"])


def run(family, folder, callbacks=(), reward_funcs=length_reward, **settings):
    recorder = Recorder()
    trainer = sapo_trainer(
        family,
        folder,
        max_steps=1,
        trainer_kwargs={
            "callbacks": [recorder, *callbacks],
            "reward_funcs": reward_funcs,
            "rollout_func": fixed_rollout(random_completions(7)),
            "train_dataset": questions(family),
        },
        **settings,
    )
    trainer.train()
    return recorder.rollouts[0]


@TEXT
@pytest.mark.parametrize("value_state", ["start", "end"])
def test_td_errors_and_the_states_that_they_read(family, value_state, tmp_path):
    """The advantages with λ = 0 are the TD errors."""
    rollout = run(family, tmp_path, value_state=value_state, gamma=0.9, lam=0.0, top_percent=40.0, beta=0.0)
    is_state = torch.zeros_like(rollout.segments.mask)
    for b, parts in enumerate(token_lists(rollout.segments)):
        states = [part[0] if value_state == "start" else part[-1] for part in parts]
        is_state[b, states] = True
        values = [rollout.values[b, t].item() for t in states] + [0.0]
        for m, part in enumerate(parts):
            reward = sum(rollout.token_rewards[b, t].item() for t in part)
            delta = reward + 0.9 * values[m + 1] - values[m]
            for t in part:
                assert rollout.td_errors[b, t].item() == pytest.approx(delta, abs=1e-6)
                assert rollout.raw_advantages[b, t].item() == pytest.approx(delta, abs=1e-6)
    assert torch.equal(rollout.value_states, is_state) and is_state.any()


@TEXT
def test_raw_advantages_are_those_before_whitening(family, tmp_path):
    rollout = run(family, tmp_path, whiten_advantages=True, advantage_clamp=None, beta=0.0)
    mask = rollout.segments.mask
    raw = rollout.raw_advantages[mask].numpy().astype(np.float64)
    whitened = (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(rollout.advantages[mask].numpy(), whitened, rtol=1e-4, atol=1e-5)
    assert np.abs(whitened - raw).max() > 0.1


@TEXT
@pytest.mark.parametrize(
    "settings", [{"critic": "none"}, {"critic": "none", "advantage_estimator": "batch", "segmentation": "sequence"}]
)
def test_advantages_without_values_have_no_states(family, settings, tmp_path):
    rollout = run(family, tmp_path, beta=0.0, **settings)
    assert rollout.value_states is None and rollout.td_errors is None and rollout.raw_advantages.any()


@TEXT
def test_behind_a_closed_gate_no_value_is_used(family, tmp_path):
    rollout = run(family, tmp_path, critic_min_explained_variance=0.999, value_state="start", beta=0.0)
    assert not rollout.value_states.any() and rollout.td_errors.isnan().all()


@TEXT
def test_parts_of_rewards_and_answers(family, tmp_path):
    rollout = run(family, tmp_path, reward_funcs=[length_reward, first_letter], reward_weights=[0.25, 2.0], beta=0.0)
    parts = rollout.reward_parts
    assert parts.names == ["length_reward", "first_letter"] and parts.weights == [0.25, 2.0]
    lengths = [
        length_reward([ids[: int(kept)].tolist()])[0]
        for ids, kept in zip(rollout.completion_ids, rollout.completion_mask.sum(1), strict=True)
    ]
    assert parts.rewards[:, 0].tolist() == pytest.approx(lengths)
    assert parts.rewards[:, 1].tolist() == pytest.approx([0.0, float("nan"), 1.0, 1.5], nan_ok=True)
    for row, reward in zip(parts.rewards.tolist(), rollout.rewards.tolist(), strict=True):
        shares = [weight * value for weight, value in zip(parts.weights, row, strict=True) if value == value]
        assert sum(shares) == pytest.approx(reward)
    assert sorted(rollout.answers) == ["a", "b", "c", "d"]


@PICTURES
@pytest.mark.parametrize("corruption", ["tokens", "blur", "other_image"])
def test_pictures_are_those_that_the_policy_saw(family, corruption, tmp_path):
    """The processor turns the pictures into the patches of the corrupted forward again."""
    seen = []

    class Spy(SegmentationCallback):
        def on_rollout(self, args, state, control, rollout, metrics):
            seen.append(rollout)

    rollout = run(family, tmp_path, visual_token_share=0.4, image_corruption=corruption, beta=0.0, callbacks=[Spy()])
    pictures = rollout.corrupted_images(3)
    assert [len(row) for row in pictures] == [1, 1, 1]
    processor = family.processing_class.image_processor
    side = processor.patch_size * processor.merge_size
    for row, original in zip(pictures, rollout.images, strict=False):
        plain = processor(images=original, return_tensors="pt")
        time, height, width = plain["image_grid_thw"][0].tolist()
        picture = np.asarray(row[0])
        assert picture.shape == (height * processor.patch_size, width * processor.patch_size, 3) and time == 1
        again = processor(images=[row[0]], do_resize=False, return_tensors="pt")["pixel_values"]
        assert again.shape == plain["pixel_values"].shape
        changed = (again - plain["pixel_values"]).abs().amax(1).view(-1, processor.merge_size**2).amax(1) > 0.02
        assert changed.any()
        if corruption == "tokens":
            squares = picture.reshape(height // 2, side, width // 2, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
            assert all((square == 0).all() for square, hidden in zip(squares, changed, strict=True) if hidden)
            # Squares that were hidden and black already have not changed.
            assert 0 < changed.sum() <= round(0.5 * len(squares))


@PICTURES
def test_no_pictures_where_nothing_is_corrupted(family, tmp_path):
    for name, settings in (("plain", {}), ("none", {"visual_token_share": 0.4, "image_corruption": "none"})):
        assert run(family, tmp_path / name, beta=0.0, **settings).corrupted_images is None


@PICTURES
@pytest.mark.parametrize("file_format", ["parquet", "json"])
def test_they_are_recorded(family, file_format, tmp_path):
    folder = tmp_path / "segments"
    callback = SegmentationCallback(folder, file_format, image_size=16)
    settings = {"visual_token_share": 0.4, "learning_rate": 3e-4, "gamma": 0.9, "beta": 0.0}
    rollout = run(family, tmp_path / "run", [callback], **settings)
    path = folder / f"segments_000000_000.{file_format}"
    is_parquet = file_format == "parquet"
    rows = pd.read_parquet(path).to_dict("records") if is_parquet else map(json.loads, path.read_text().splitlines())
    for b, row in enumerate(rows):
        kept = rollout.segments.mask[b]
        for name in ("raw_advantages", "td_errors", "value_states"):
            assert list(row[name]) == pytest.approx(getattr(rollout, name)[b][kept].float().tolist(), abs=1e-6)
        assert row["answer"] == str(rollout.answers[b])
        assert (list(row["reward_names"]), list(row["reward_weights"])) == (["length_reward"], [1.0])
        assert list(row["reward_values"]) == pytest.approx([rollout.rewards[b].item()])
        (name,), (original,) = row["corrupted_images"], row["images"]
        with Image.open(folder / "images" / name) as image:
            assert max(image.size) == 16 and name != original
    settings_file = json.loads((folder / "run.json").read_text())
    assert settings_file["differences"]["visual_token_share"] == 0.4
    assert settings_file["other_settings"]["learning_rate"] == 3e-4 and settings_file["other_settings"]["gamma"] == 0.9
    assert str(tmp_path) not in (folder / "run.json").read_text()
