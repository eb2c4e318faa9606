"""Corrupted images, against pictures that are changed before a processor sees them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from sapo_trl.image_corruption import PatchLayout, blur, hide_tokens, other_images, patches_per_row
from sapo_trl.trainer.sight import patch_layout
from tests.strategies import seeds


MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
LAYOUT = PatchLayout(2, 2, 2, tuple(-m / s for m, s in zip(MEAN, STD, strict=True)))
few = settings(max_examples=40)


def patches_of(counts, seed=0):
    return torch.randn(sum(counts), LAYOUT.features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_pixels_are_the_processors(family):
    """A black rectangle, painted on the picture or on its pixels, gives the same patches."""
    images = family.processing_class.image_processor
    layout = patch_layout(family.build_model(), family.processing_class)
    side, rng = layout.patch_size * layout.merge_size, np.random.default_rng(0)
    picture = rng.integers(0, 256, (2 * side, 3 * side, 3), dtype=np.uint8)
    sized = {"do_resize": False, "return_tensors": "pt"}
    plain = images(images=[Image.fromarray(picture)], **sized)
    grid = tuple(plain["image_grid_thw"][0].tolist())
    pixels = layout.to_pixels(plain["pixel_values"].unsqueeze(0), grid)
    assert pixels.shape == (1, layout.temporal_patch_size, 3, 2 * side, 3 * side)
    assert torch.equal(layout.to_patches(pixels)[0], plain["pixel_values"])
    picture[3 : side + 5, 2:side] = 0
    painted = images(images=[Image.fromarray(picture)], **sized)
    pixels[..., 3 : side + 5, 2:side] = torch.tensor(layout.black).view(3, 1, 1)
    torch.testing.assert_close(layout.to_patches(pixels)[0], painted["pixel_values"])


@few
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(0, 10), seeds)
def test_whole_visual_tokens_are_hidden(tokens, tenths, seed):
    counts = [4 * n for n in tokens]
    pixel_values = patches_of(counts)
    before, rows = pixel_values.clone(), torch.tensor(counts)
    hidden = hide_tokens(pixel_values, rows, LAYOUT, tenths / 10, seed)
    assert torch.equal(pixel_values, before)
    black = torch.tensor(LAYOUT.black).repeat_interleave(8)
    for n, old, new in zip(tokens, pixel_values.split(counts), hidden.split(counts), strict=True):
        # Four patches in a row are one visual token.
        old, new = old.view(n, 4, LAYOUT.features), new.view(n, 4, LAYOUT.features)
        is_hidden = [bool((token == black).all()) for token in new]
        assert sum(is_hidden) == round(tenths / 10 * n)
        assert all(torch.equal(o, t) for o, t, gone in zip(old, new, is_hidden, strict=True) if not gone)
        # The same for each row on its own.
        flat = old.reshape(-1, LAYOUT.features)
        assert torch.equal(hide_tokens(flat, torch.tensor([4 * n]), LAYOUT, tenths / 10, seed), new.view(flat.shape))


def test_every_token_is_hidden_sometimes_and_seeds_differ():
    pixel_values, rows = patches_of([48]), torch.tensor([48])
    changed = torch.stack(
        [(hide_tokens(pixel_values, rows, LAYOUT, 0.5, seed) != pixel_values).any(1) for seed in range(60)]
    )
    often = changed.sum(0)
    assert ((often > 12) & (often < 48)).all() and len({tuple(row.tolist()) for row in changed}) > 50


def test_blur_is_a_gaussian():
    """Against a plain sum over neighbours, of two images of different sizes; and a flat image stays as it is."""
    grids = torch.tensor([[1, 4, 2], [1, 2, 4]])
    pixel_values = patches_of([8, 8])
    blurred = blur(pixel_values, grids, LAYOUT)
    for grid, old, new in zip(grids.tolist(), pixel_values.split(8), blurred.split(8), strict=True):
        old, new = (LAYOUT.to_pixels(x.unsqueeze(0), grid)[0, 0, 1] for x in (old, new))
        height, width = old.shape
        for y, x in [(0, 0), (1, 2), (height - 1, width - 1)]:
            total = weight = 0.0
            for dy in range(-6, 7):
                for dx in range(-6, 7):
                    w = np.exp(-(dy**2 + dx**2) / 8)
                    total += w * old[min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)].item()
                    weight += w
            assert new[y, x].item() == pytest.approx(total / weight, abs=1e-5)
    flat = torch.full_like(pixel_values, 0.7)
    torch.testing.assert_close(blur(flat, grids, LAYOUT), flat)


def test_other_images_take_their_places():
    grids = torch.tensor([[1, 2, 4], [1, 2, 4], [1, 4, 4], [1, 2, 4]])
    one, two, three = patches_of([8]), patches_of([16], 1), patches_of([8], 2)
    found = other_images(torch.cat([one, one, two, three]), grids, LAYOUT, ["a", "a", "b", "c"]).split([8, 8, 16, 8])
    assert torch.equal(found[0], found[1])
    # Two frames of an image are the same.
    still = LAYOUT.to_pixels(one.unsqueeze(0), (1, 2, 4))[:, :1].expand(-1, 2, -1, -1, -1)
    assert torch.equal(found[3], LAYOUT.to_patches(still.contiguous())[0])
    wide = functional.interpolate(
        LAYOUT.to_pixels(two.unsqueeze(0), (1, 4, 4))[0, :1], size=(4, 8), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(LAYOUT.to_pixels(found[0].unsqueeze(0), (1, 2, 4))[0, 1], wide[0])


def test_the_only_image_becomes_black():
    found = other_images(patches_of([8, 8]), torch.tensor([[1, 2, 4]] * 2), LAYOUT, ["a", "a"])
    pixels = LAYOUT.to_pixels(found.view(2, 8, -1), (1, 2, 4))
    assert torch.equal(pixels, torch.tensor(LAYOUT.black).view(3, 1, 1).expand_as(pixels))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hide_tokens(patches_of([4]), torch.tensor([4]), LAYOUT, -0.1), r"`share` .* got -0.1"),
        (lambda: hide_tokens(torch.zeros(4, 3), torch.tensor([4]), LAYOUT, 0.5), r"\(patches, 24\).* got \(4, 3\)"),
        (lambda: hide_tokens(patches_of([4]), torch.tensor([1, 3]), LAYOUT, 0.5), r"multiples of 4, .* got \[1, 3\]"),
        (lambda: hide_tokens(patches_of([4]), torch.tensor([8, -4]), LAYOUT, 0.5), r"got \[8, -4\]"),
        (lambda: patches_per_row({"pixel_values": patches_of([4]), "num_images": [1]}, 1), "but no `image_grid_thw`"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
