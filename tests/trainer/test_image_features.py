"""Features of images that a frozen tower computes once a rollout: the same results, and how often it runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from sapo_trl.trainer.image_features import ImageFeatures, has_frozen_tower, image_keys
from tests.exact_arithmetic import exact_lm_head, make_exact
from tests.testing_utils import Recorder, fixed_rollout, random_completions, sapo_trainer


ONE_FAMILY = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
LANGUAGE_LORA = {"r": 4, "target_modules": r".*language_model.*_proj"}


def well_formed(prompts, trainer):
    """Responses that role-aware weighting reads."""
    texts = [f"<perception>A=3, B={i}</perception><think>3+{i}</think>\\boxed{{{i}}}" for i in range(len(prompts))]
    return trainer.tokenizer(texts)["input_ids"]


def trained(family, folder, reuse: bool, lora: dict | None = None, responses=None, **overrides):
    """In float64, two rollouts of two steps of SGD, four prompts each; a frozen tower unless adapters are in it."""
    recorder, images = Recorder(), []
    model = make_exact(family.build_model())
    if lora is None:
        model.model.visual.requires_grad_(False)
    set_seed(0)  # weights of value heads and adapters
    trainer = sapo_trainer(
        family,
        folder,
        model=model,
        reuse_image_features=reuse,
        optim="sgd",
        num_generations=2,
        per_device_train_batch_size=4,
        num_mini_batches=2,
        max_steps=4,
        learning_rate=0.02,
        critic_learning_rate=0.02,
        trainer_kwargs={
            "rollout_func": fixed_rollout(responses or random_completions(3, 2, 8)),
            "callbacks": [recorder],
            **({"peft_config": LoraConfig(**lora)} if lora else {}),
        },
        **overrides,
    )
    trainer.model.double()  # adapters too
    if trainer.critic is not None:
        trainer.critic.value_head.double()
    models = [trainer.accelerator.unwrap_model(trainer.model)]
    if trainer.args.critic == "separate":
        models.append(trainer.critic.module)
    parameters = [*trainer.model.named_parameters()]
    parameters += [] if trainer.critic is None else trainer.critic.value_head.learned_parameters()
    before = {name: parameter.detach().clone() for name, parameter in parameters}
    for each in models:
        for name, module in each.named_modules():
            if name.endswith("visual"):
                module.register_forward_pre_hook(
                    lambda module, args, kwargs: images.append(len(kwargs["grid_thw"])), with_kwargs=True
                )
    with exact_lm_head():
        trainer.train()
    trainer.moved = {name: not torch.equal(parameter, before[name]) for name, parameter in parameters}
    return trainer, recorder.rollouts, images


CRITICS = {
    "separate": (None, {"critic": "separate"}, 2),
    "shared": (None, {"critic": "shared", "beta": 0.1, "avoid_padding": False}, 1),
    "ladder": (None, {"critic": "ladder", "gradient_checkpointing": True}, 1),
    "adapter": (LANGUAGE_LORA, {"critic": "adapter", "beta": 0.1, "gradient_checkpointing": True}, 1),
}


@pytest.mark.parametrize(
    ("family", "critic"),
    [
        ("qwen2_5_vl", "separate"),
        ("qwen2_5_vl", "shared"),
        ("qwen2_5_vl", "adapter"),
        pytest.param("qwen3_vl", "separate", marks=pytest.mark.slow),
        ("qwen3_vl", "shared"),
        ("qwen2_5_vl", "ladder"),
        pytest.param("qwen3_vl", "adapter", marks=pytest.mark.slow),
    ],
    indirect=["family"],
)
def test_training_is_what_it_is_without(family, critic, tmp_path):
    lora, overrides, towers = CRITICS[critic]
    without, rollouts, every_image = trained(family, tmp_path / "without", False, lora, **overrides)
    with_it, same_rollouts, images = trained(family, tmp_path / "with", True, lora, **overrides)
    for expected, found in zip(rollouts, same_rollouts, strict=True):
        for name in ("logps", "entropies", "values", "advantages"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-9, rtol=0)
    for expected, found in (
        (without.model.named_parameters(), with_it.model.named_parameters()),
        (without.critic.value_head.learned_parameters(), with_it.critic.value_head.learned_parameters()),
    ):
        after, learned = dict(found), 0
        for name, parameter in expected:
            torch.testing.assert_close(after[name], parameter, atol=1e-9, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
            learned += without.moved[name]
        assert learned > 0
    # Four prompts a rollout, of two responses each.
    assert sum(images) == 2 * 4 * towers
    assert sum(every_image) >= 2 * 8 * 2 * towers


@ONE_FAMILY
def test_pixels_that_somebody_changes_have_features_of_their_own(family, tmp_path):
    """Role-aware weights come from a forward over hidden patches."""
    overrides = {
        "critic": "none",
        "advantage_estimator": "batch",
        "advantage_weighting": "role_aware",
        "max_completion_length": 96,
        "responses": well_formed,
    }
    _, rollouts, _ = trained(family, tmp_path / "without", False, **overrides)
    _, same_rollouts, images = trained(family, tmp_path / "with", True, **overrides)
    torch.testing.assert_close(same_rollouts[0].advantages, rollouts[0].advantages, atol=1e-9, rtol=0)
    by_response = [row[row != 0].unique() for row in rollouts[0].advantages]
    assert max(map(len, by_response)) > 3
    # Four images a rollout, and each of them with patches hidden, the same ones for both responses.
    assert sum(images) == 2 * (4 + 4)


@ONE_FAMILY
@pytest.mark.parametrize(
    "target_modules", [pytest.param("all-linear", marks=pytest.mark.slow), ["qkv", "q_proj"]], ids=str
)
def test_adapters_in_the_tower_learn_from_every_forward(family, target_modules, tmp_path):
    lora = {"r": 4, "target_modules": target_modules}
    _, _, every_image = trained(family, tmp_path / "without", False, lora, critic="shared")
    trainer, _, images = trained(family, tmp_path / "with", True, lora, critic="shared")
    assert images == every_image
    in_tower = {n: p for n, p in trainer.model.named_parameters() if "visual" in n and "lora_B" in n}
    assert in_tower and all(parameter.abs().max() > 0 for parameter in in_tower.values())


@ONE_FAMILY
def test_what_is_frozen(family):
    model = family.build_model()
    backbone = model.model
    assert not has_frozen_tower(backbone)
    backbone.visual.requires_grad_(False)
    assert has_frozen_tower(backbone)
    backbone.visual.blocks[0].attn.attention_dropout = 0.1
    assert not has_frozen_tower(backbone)
    backbone.visual.blocks[0].attn.attention_dropout = 0.0
    backbone.visual.merger.ln_q.weight.requires_grad_(True)
    assert not has_frozen_tower(backbone)
    backbone.visual.dropout = 0.1
    backbone.visual.requires_grad_(False)
    assert not has_frozen_tower(backbone)
    backbone.visual.dropout = 0.0
    assert has_frozen_tower(backbone)
    # A backbone whose decoder cannot be told from its tower.
    backbone.get_decoder = lambda: backbone
    assert not has_frozen_tower(backbone)
    del backbone.get_decoder
    adapted = get_peft_model(model, LoraConfig(**LANGUAGE_LORA))
    assert has_frozen_tower(adapted.get_base_model().base_model)


def inputs_of(family, colors: list[int]) -> dict[str, torch.Tensor]:
    """Images of one colour each, as patches."""
    patches = torch.stack([torch.full((16, 1176), color / 7) for color in colors]).flatten(0, 1)
    patches = patches + torch.arange(1176) / 1000
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * len(colors))}


@ONE_FAMILY
def test_features_come_in_the_order_of_the_images(family):
    backbone = family.build_model().requires_grad_(False).model
    features, calls = ImageFeatures(), []
    backbone.visual.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    for colors, computed in [([1, 2, 1], 2), ([3, 2, 4, 1, 3], 2), ([4, 4], 0)]:
        inputs, calls[:] = inputs_of(family, colors), []
        keys = image_keys(**inputs)
        found = features.in_place_of_pixels(backbone, {**inputs, "input_ids": None}, keys)
        assert found.keys() == {"image_grid_thw", "input_ids", "mm_encoder_outputs"} and sum(calls) == computed
        expected = backbone.get_image_features(**inputs, return_dict=True).pooler_output
        for one, other in zip(found["mm_encoder_outputs"]["image"].pooler_output, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    with_video = {**inputs, "pixel_values_videos": inputs["pixel_values"]}
    assert features.in_place_of_pixels(backbone, with_video, keys) is with_video
    # Weights may have changed by the next rollout, and what is frozen.
    before = found["mm_encoder_outputs"]["image"].pooler_output[0]
    backbone.visual.merger.mlp[0].weight.mul_(2)
    features.clear()
    after = features.in_place_of_pixels(backbone, inputs, keys)["mm_encoder_outputs"]["image"].pooler_output[0]
    assert (after - before).abs().max() > 0.01
    backbone.visual.requires_grad_(True)
    features.clear()
    assert features.in_place_of_pixels(backbone, inputs, keys) is inputs


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_images_are_the_same_if_and_only_if_their_pixels_and_grids_are(data):
    grids = data.draw(st.lists(st.sampled_from([(1, 2, 2), (1, 2, 4), (1, 4, 2), (2, 2, 2)]), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8]))
    shape = data.draw(st.sampled_from([(3,), (3, 2, 2)]))
    # Of few values, which differ in few bits, so that images of one size are often the same but for a few pixels.
    low, high = data.draw(st.sampled_from([(0, 2), (-1, 2)])) if dtype != torch.uint8 else (0, 2)
    images = [torch.randint(low, high, (t * h * w, *shape), generator=generator).to(dtype) for t, h, w in grids]
    if data.draw(st.booleans()) and images[0].shape == images[1].shape:
        images[1] = images[0].clone()
        if data.draw(st.booleans()):
            images[1][data.draw(st.integers(0, len(images[1]) - 1)), data.draw(st.integers(0, 2))] += 1
        if dtype != torch.uint8 and data.draw(st.booleans()):
            images[1][:2] *= -1  # an even number of signs
    keys = image_keys(torch.cat(images), torch.tensor(grids))
    for one in range(len(grids)):
        for other in range(len(grids)):
            same = grids[one] == grids[other] and torch.equal(images[one], images[other])
            assert (keys[one] == keys[other]) == same


def test_patches_in_another_order_are_another_image():
    patches = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    keys = image_keys(torch.cat([patches, patches.flip(0)]), torch.tensor([[1, 2, 2]] * 2))
    assert keys[0] != keys[1] and keys[0][1:] == (1, 2, 2)
