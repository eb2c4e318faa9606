"""Model families that lay out their images in other ways than Qwen's: rows of a batch are what each row is alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import prepare_multimodal_messages

from sapo_trl import SAPOTrainer
from sapo_trl.rollouts import TokenizedPrompts
from tests.testing_utils import Recorder, length_reward, logged, sapo_config
from tests.trainer.vision_families import VISION_FAMILIES, VisionFamily, pictured_prompts


ONE, TWO, FEW, MIXED = [1, 1, 1, 1], [2, 2, 2, 2], [0, 2, 0, 0], [0, 1, 2, 1]
"""Numbers of images of four prompts. MIXED has as many images as prompts, which tells nothing about the layout."""

CRITICS = {
    "monte_carlo": {"critic": "monte_carlo", "segmentation": "entropy", "num_continuations": 2},
    "tree": {
        "critic": "tree",
        "segmentation": "sequence",
        "num_generations": 2,
        "tree_widths": [2, 2],
        "tree_segment_length": 3,
        "kl_placement": "loss",
        "kl_estimator": "k3",
    },
    "ladder": {"critic": "ladder", "critic_reads": 3},
}


def each_family_with_a_critic():
    """Every family with one of the critics, in turn, and with the others where time does not matter."""
    cases = []
    for index, family in enumerate(VISION_FAMILIES):
        fast = list(CRITICS)[index % len(CRITICS)]
        cases += [pytest.param(family, c, marks=() if c == fast else pytest.mark.slow) for c in CRITICS]
    return pytest.mark.parametrize(("vision_family", "critic"), cases, indirect=["vision_family"])


@pytest.fixture(params=list(VISION_FAMILIES))
def vision_family(request) -> VisionFamily:
    return VISION_FAMILIES[request.param]()


def family_trainer(
    family: VisionFamily, output_dir, num_images: list[int], **overrides
) -> tuple[SAPOTrainer, Recorder]:
    recorder = Recorder()
    trainer = SAPOTrainer(
        family.build_model(),
        length_reward,
        # A row a forward: also one without image.
        sapo_config(output_dir, per_device_train_batch_size=1, num_mini_batches=4, max_steps=4, beta=0.0, **overrides),
        train_dataset=pictured_prompts(num_images),
        processing_class=family.processor,
        callbacks=[recorder],
    )
    return trainer, recorder


def alone(trainer: SAPOTrainer, row: dict, completion: list[int]) -> torch.Tensor:
    """Log-probabilities of a completion by a plain forward of its row, without padding or neighbours."""
    prompt = prepare_multimodal_messages(row["prompt"], images=row["images"])
    text = trainer.processing_class.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    images = [row["images"]] if row["images"] else None
    inputs = trainer.processing_class(text=[text], images=images, return_tensors="pt")
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([completion])], dim=1)
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(completion)), value=value)
    with torch.no_grad():
        logits = trainer.model(**inputs).logits[0, -len(completion) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)


@pytest.mark.parametrize("num_images", [ONE, TWO, FEW, MIXED], ids=["one", "two", "few", "mixed"])
def test_rows_and_images_stay_together(vision_family, num_images, tmp_path):
    """Rows taken in any order, as critics do that continue responses, are what each row is alone."""
    trainer, _ = family_trainer(vision_family, tmp_path, num_images, critic="none")
    rows = list(trainer.train_dataset)
    prompts = trainer.tokenized_prompts(rows)
    completions = [[30, 31, 32], [40], [50, 51], [60, 61, 62, 63]]
    order = [2, 0, 2, 3, 1]
    pad, device = trainer.tokenizer.pad_token_id, trainer.accelerator.device
    batch = prompts.model_inputs(order, [completions[row] for row in order], pad, device)
    trainer.model.eval()
    with torch.no_grad():
        for rows_per_forward in (None, 1, 2):
            together = trainer.policy_forward(trainer.model, batch, rows_per_forward).logps
            for position, row in enumerate(order):
                expected = alone(trainer, rows[row], completions[row])
                torch.testing.assert_close(together[position, : len(expected)], expected, rtol=0, atol=1e-5)


@each_family_with_a_critic()
def test_training_on_prompts_with_and_without_images(vision_family, critic, tmp_path):
    """The rollout's log-probabilities are those of each row alone, and each row can be trained on alone."""
    trainer, recorder = family_trainer(vision_family, tmp_path, MIXED, learning_rate=0.0, **CRITICS[critic])
    rows = list(trainer.train_dataset)
    trainer.train()
    # Each of the four micro-batches was trained on at the policy that its response was sampled from.
    assert logged(trainer, "approx_kl") == pytest.approx([0.0] * 4, abs=1e-5)
    (rollout,) = recorder.rollouts
    trainer.model.eval()
    assert rollout.segments.mask.any(dim=1).all()
    for prompt_ids, ids, mask, logps in zip(
        rollout.prompt_ids, rollout.completion_ids, rollout.segments.mask, rollout.logps, strict=True
    ):
        text = trainer.tokenizer.decode(prompt_ids)
        (row,) = (row for row in rows if row["prompt"][0]["content"] in text)
        length = int(mask.nonzero().max()) + 1  # of a tree's edge the last tokens only
        expected = alone(trainer, row, ids[:length].tolist())
        torch.testing.assert_close(logps[mask], expected[mask[:length]], rtol=0, atol=1e-5)


class TestCounts:
    """Which entries of the processor's fields belong to which prompt."""

    PLACEHOLDER = 7

    @settings(max_examples=50)
    @given(
        tiles=st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=5),
        per_tile=st.integers(1, 3),
        form=st.sampled_from(["tensor", "array", "list of arrays", "list of tensors"]),
        data=st.data(),
    )
    def test_entries_follow_their_prompt(self, tiles, per_tile, form, data):
        """
        Any number of images of any number of tiles each.

        Args:
            tiles (`list[list[int]]`): tiles of each image of each prompt.
        """
        owners = [row for row, images in enumerate(tiles) for number in images for _ in range(number)]
        if not owners:
            return
        pixels = torch.stack([torch.full((3, 2, 2), 10.0 * row + index) for index, row in enumerate(owners)])
        forms = {
            "tensor": pixels,
            "array": pixels.numpy(),
            "list of arrays": list(pixels.numpy()),
            "list of tensors": list(pixels),
        }
        sizes = [(row, index) for row, images in enumerate(tiles) for index in range(len(images))]
        prompts = TokenizedPrompts(
            ids=[[1, *[self.PLACEHOLDER] * (per_tile * sum(images)), 2] for images in tiles],
            images=[["image"] * len(images) for images in tiles],
            fields={"pixel_values": forms[form], "image_sizes": sizes},
            placeholders={self.PLACEHOLDER},
        )
        order = data.draw(st.lists(st.integers(0, len(tiles) - 1), min_size=1, max_size=6))
        taken = prompts.extended(order, [[9]] * len(order))
        expected = [index for row in order for index, owner in enumerate(owners) if owner == row]
        if not expected:
            assert taken.images is None and taken.fields == {}
            return
        assert torch.equal(torch.as_tensor(taken.fields["pixel_values"]), pixels[expected])
        of_images = [[row, index] for row in order for index in range(len(tiles[row]))]
        assert taken.fields["image_sizes"].tolist() == of_images

    def test_images_of_different_shapes_are_an_error(self):
        prompts = TokenizedPrompts(
            [[7], [7]], [["a"], ["b"]], {"pixel_values": [torch.zeros(3, 2, 2), torch.zeros(3, 2, 4)]}, {7}
        )
        with pytest.raises(ValueError, match=r"'pixel_values' has entries of different shapes, \[\(3, 2, 2\), \(3, 2"):
            prompts.extended([0], [[]])
