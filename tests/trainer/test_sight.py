"""Scoring a rollout once more with corrupted images, with real models."""

import pytest
import torch

from sapo_trl import SAPOTrainer
from sapo_trl.callbacks import RolloutCallback
from sapo_trl.presets import preset_settings
from sapo_trl.trainer.sight import CorruptedImages
from tests.testing_utils import length_reward, logged, sapo_config, sapo_trainer, state_of, unmoved
from tests.trainer.vision_families import VISION_FAMILIES, pictured_prompts


PICTURES = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)


class Keep(RolloutCallback):
    """Keeps the rollouts that it sees."""

    def __init__(self):
        self.rollouts = []

    def on_rollout(self, args, state, control, rollout, metrics):
        self.rollouts.append(rollout)


def rollout_of(family, tmp_path, blind=False, **settings):
    """A trainer's first rollout; a blind policy's visual tokens are all zeros."""
    keep = Keep()
    trainer = sapo_trainer(
        family,
        tmp_path,
        trainer_kwargs={"callbacks": [keep]},
        visual_token_share=0.4,
        max_steps=1,
        max_completion_length=12,
        **settings,
    )
    if blind:
        tower = trainer.model.model.visual
        for merger in (tower.merger, *getattr(tower, "deepstack_merger_list", ())):
            last = [module for module in merger.modules() if isinstance(module, torch.nn.Linear)][-1]
            last.weight.data.zero_()
            last.bias.data.zero_()
    trainer.train()
    return trainer, keep.rollouts[0]


@PICTURES
@pytest.mark.parametrize("corruption", ["tokens", "blur", "other_image"])
def test_tokens_depend_on_the_picture(family, corruption, tmp_path):
    trainer, rollout = rollout_of(family, tmp_path, image_corruption=corruption)
    d, mask = rollout.visual_dependency, rollout.segments.mask
    assert (d[mask] > 0).any() and not d[~mask].any() and (d >= 0).all()
    (first, *_) = logged(trainer, "visual_dependency/mean")
    assert first == pytest.approx(d.sum().item() / mask.sum().item(), rel=1e-4)
    assert logged(trainer, "time/corrupted_images")[0] > 0
    kept = rollout.policy_mask.sum(1)
    assert torch.equal(kept, torch.ceil(mask.sum(1) * 0.4 - 1e-6).long())
    assert (torch.where(rollout.policy_mask, d, 99).amin(1) >= torch.where(rollout.policy_mask, 0, d).amax(1)).all()


@PICTURES
def test_a_picture_that_is_not_corrupted_changes_nothing(family, tmp_path):
    for settings in ({"image_corruption": "none"}, {"image_corruption_share": 0.0}):
        _, rollout = rollout_of(family, tmp_path, **settings)
        assert not rollout.visual_dependency.any()
        # Nothing tells tokens apart: all are learned from.
        assert torch.equal(rollout.policy_mask, rollout.segments.mask)


@PICTURES
@pytest.mark.parametrize("corruption", ["tokens", "blur", "other_image"])
def test_a_policy_that_ignores_the_picture_depends_on_nothing(family, corruption, tmp_path):
    _, rollout = rollout_of(family, tmp_path, blind=True, image_corruption=corruption)
    assert rollout.segments.mask.any() and not rollout.visual_dependency.any()


@PICTURES
def test_kept_features_are_not_those_of_corrupted_images(family, tmp_path):
    """With a frozen tower the features of images are kept, by keys of the images."""
    model = family.build_model()
    model.model.visual.requires_grad_(False)
    keep = Keep()
    trainer = sapo_trainer(
        family,
        tmp_path,
        model=model,
        trainer_kwargs={"callbacks": [keep]},
        visual_token_share=0.4,
        max_steps=1,
        max_completion_length=12,
    )
    trainer.train()
    assert keep.rollouts[0].visual_dependency.any()


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
@pytest.mark.parametrize("settings", [{"visual_token_share": 0.4}, {"advantage_weighting": "role_aware"}])
def test_a_text_model_is_refused(family, settings, tmp_path):
    with pytest.raises(ValueError, match="`visual_token_share`.* a model of type 'qwen2' takes none: leave them out"):
        sapo_trainer(family, tmp_path, **settings)


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_families_with_other_patches_are_refused(name, tmp_path):
    family = VISION_FAMILIES[name]()
    with pytest.raises(ValueError, match="in another way than Qwen's families.*leave out `visual_token_share`"):
        SAPOTrainer(
            family.build_model(),
            length_reward,
            sapo_config(tmp_path, visual_token_share=0.4),
            train_dataset=pictured_prompts([1, 1, 1, 1]),
            processing_class=family.processor,
        )


@PICTURES
def test_each_rollout_hides_other_tokens(family, tmp_path):
    trainer = sapo_trainer(family, tmp_path, visual_token_share=0.4)
    corrupt = trainer.corrupted_images
    assert isinstance(corrupt, CorruptedImages)
    features, side = corrupt.layout.features, corrupt.layout.merge_size
    batch = {
        "completion_ids": torch.zeros(1, 2),
        "pixel_values": torch.randn(36 * side**2, features),
        "image_grid_thw": torch.tensor([[1, 6 * side, 6 * side]]),
        "num_images": [1],
        "image_keys": [[(0, 0, 0, 0)]],
    }
    one, same, other = (corrupt(batch, seed) for seed in (1, 1, 2))
    assert torch.equal(one["pixel_values"], same["pixel_values"]) and "image_keys" not in one
    assert not torch.equal(one["pixel_values"], other["pixel_values"])


@PICTURES
@pytest.mark.parametrize("preset", ["vppo", "papo"])
@pytest.mark.parametrize("frozen_tower", [False, True])
def test_presets_train(family, preset, frozen_tower, tmp_path):
    """Real models, several micro-batches; with a frozen tower the features of images are kept."""
    model = family.build_model()
    if frozen_tower:
        model.model.visual.requires_grad_(False)
    before = state_of(model)
    settings = {**preset_settings(preset), "num_generations": 2, "entropy_penalty_coef": 0.0, "beta": 0.0}
    trainer = sapo_trainer(family, tmp_path, model=model, gradient_accumulation_steps=2, max_steps=1, **settings)
    trainer.train()
    still = unmoved(before, model)
    assert not [name for name in still if "visual" not in name and "lm_head" not in name]
    assert all("visual" in name for name in before if name in still) or not frozen_tower
    if preset == "papo":
        assert logged(trainer, "perception_kl")[0] > 0
    else:
        assert logged(trainer, "response_weight/max")[0] > 1
