"""
Images that show less: hidden visual tokens, blur, another image in their place. Pure functions on tensors.

Images are patches in the layout of Qwen's families: a patch per line, image after image. Squares of `merge_size` by
`merge_size` neighbouring patches follow each other, and the vision tower merges each square into one visual token.
Every corruption keeps the number of patches, so prompts stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from .segments import accumulation_dtype


ImageCorruption = Literal["tokens", "blur", "other_image", "none"]


@dataclass(frozen=True)
class PatchLayout:
    """
    The form of a model's patches.

    Args:
        patch_size (`int`): height and width of a patch, in pixels.
        merge_size (`int`): patches along a side of the square that becomes one visual token.
        temporal_patch_size (`int`): frames of a patch. An image is repeated in all of them.
        black (`tuple[float, ...]`): value of a black pixel by channel, after the processor's scaling.
        white (`tuple[float, ...]`, *optional*, defaults to `(1.0, 1.0, 1.0)`): the same of a white pixel.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    black: tuple[float, ...]
    white: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    def features(self) -> int:
        """Numbers of a patch."""
        return len(self.black) * self.temporal_patch_size * self.patch_size**2

    def to_pixels(self, patches: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """Patches `(N, P, features)` of images with the same grid `(time, height, width)`, as `(N, F, C, H, W)`."""
        time, height, width = grid
        m, p, t = self.merge_size, self.patch_size, self.temporal_patch_size
        x = patches.view(-1, time, height // m, width // m, m, m, len(self.black), t, p, p)
        x = x.permute(0, 1, 7, 6, 2, 4, 8, 3, 5, 9)
        return x.reshape(len(patches), time * t, len(self.black), height * p, width * p)

    def to_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images `(N, F, C, H, W)` as patches `(N, P, features)`: the inverse of [`PatchLayout.to_pixels`]."""
        m, p, t = self.merge_size, self.patch_size, self.temporal_patch_size
        count, frames, channels, height, width = pixels.shape
        x = pixels.view(count, frames // t, t, channels, height // (m * p), m, p, width // (m * p), m, p)
        return x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(count, -1, self.features)

    def to_bytes(self, patches: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """The first frame of an image's patches `(P, features)` as uint8 `(H, W, C)`, not scaled."""
        pixels = self.to_pixels(patches.float().unsqueeze(0), grid)[0, 0].permute(1, 2, 0).cpu()
        black, white = torch.tensor(self.black), torch.tensor(self.white)
        return (255 * (pixels - black) / (white - black)).round().clamp(0, 255).to(torch.uint8)


def patches_per_row(batch: Mapping[str, Any], num_rows: int) -> torch.Tensor:
    """
    Patches of each row's images.

    Args:
        batch (`Mapping[str, Any]`): with images `pixel_values`, `image_grid_thw` and `num_images`, see
            [`~sapo_trl.rollouts.types.RolloutBatch`].
        num_rows (`int`): rows of the batch.

    Returns:
        `torch.Tensor`: int64 `(B,)`, 0 for a row without an image.

    Raises:
        ValueError: if the images cannot be told apart, or their number does not fit.
    """
    missing = [name for name in ("pixel_values", "image_grid_thw", "num_images") if batch.get(name) is None]
    if "pixel_values" in missing:  # a rollout of prompts without images, among rollouts with images
        return torch.zeros(num_rows, dtype=torch.int64)
    if missing:
        raise ValueError(
            f"The batch has images, but no {' and no '.join(f'`{name}`' for name in missing)} to tell which row they "
            "belong to: corrupted images need a model family that lays images out as Qwen's do."
        )
    patches = batch["image_grid_thw"].prod(dim=-1)
    num_images = torch.as_tensor(batch["num_images"], dtype=torch.int64, device=patches.device)
    if num_images.shape != (num_rows,) or num_images.sum() != patches.size(0):
        raise ValueError(
            f"`num_images` must be the number of images of each of the {num_rows} rows and sum up to the "
            f"{patches.size(0)} of `image_grid_thw`, got {num_images.tolist()}."
        )
    return patches.new_zeros(num_rows).scatter_add_(0, torch.repeat_interleave(num_images), patches)


def hide_tokens(
    pixel_values: torch.Tensor, patches_per_row: torch.Tensor, layout: PatchLayout, share: float, seed: int = 0
) -> torch.Tensor:
    """
    Blacken a random share of each batch row's visual tokens.

    All patches of a hidden token are black, so that no part of it can be read. VPPO blackens single patches instead:
    with half of them, one token in 16 disappears as a whole.

    The choice of a row's tokens depends only on `seed` and on the row's number of tokens. So it does not depend on how
    the batch is cut or shared among processes, and the responses to one prompt are all compared with the same
    corrupted image. Another `seed` gives other tokens.

    Args:
        pixel_values (`torch.Tensor`): float `(patches, features)`, the patches of batch row 0, then of row 1, and so
            on. Not modified.
        patches_per_row (`torch.Tensor`): int64 `(B,)`, 0 for a row without an image.
        layout ([`PatchLayout`]): of the patches.
        share (`float`): in `[0, 1]`: `round(share * n)` of a row's `n` visual tokens are hidden.
        seed (`int`, *optional*, defaults to `0`): seed of the draw.

    Returns:
        `torch.Tensor`: a new tensor of the shape, dtype and device of `pixel_values`.

    Raises:
        ValueError: if `share` is out of range or the shapes do not fit.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`share` is a share of the visual tokens: it must lie in [0, 1], got {share}.")
    group = layout.merge_size**2
    patches = patches_per_row.to("cpu", torch.int64)
    if pixel_values.dim() != 2 or pixel_values.size(1) != layout.features:
        raise ValueError(
            f"`pixel_values` must be of shape (patches, {layout.features}), as Qwen's image processors make them, got "
            f"{tuple(pixel_values.shape)}."
        )
    if patches.dim() != 1 or (patches < 0).any() or (patches % group).any() or patches.sum() != len(pixel_values):
        raise ValueError(
            f"`patches_per_row` must be the patches of each batch row, multiples of {group}, and sum up to the "
            f"{len(pixel_values)} of `pixel_values`, got {patches.tolist()}."
        )
    counts = patches // group
    rows = torch.repeat_interleave(counts)
    number_in_row = torch.arange(len(rows)) - (torch.cumsum(counts, dim=0) - counts)[rows]
    # The n-th token of every row gets the n-th score. Scores are drawn on the CPU: its uniform generator makes the
    # same first n numbers for any total. So neither the other rows nor the device matter.
    longest = int(counts.max()) if counts.numel() else 0
    scores = torch.rand(longest, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[number_in_row]
    # Ordered by row, and by score within a row: the position in that order is the rank within the row.
    by_score = torch.argsort(scores, stable=True)
    order = by_score[torch.argsort(rows[by_score], stable=True)]
    is_hidden = torch.empty_like(rows, dtype=torch.bool)
    is_hidden[order] = number_in_row < torch.round(share * counts.double()).long()[rows]
    is_hidden = is_hidden.repeat_interleave(group).to(pixel_values.device).unsqueeze(1)
    return torch.where(is_hidden, _black_patch(layout).to(pixel_values), pixel_values)


def blur(pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
    """
    Blur images by a Gaussian whose standard deviation is the side of a patch.

    Args:
        pixel_values (`torch.Tensor`): float `(patches, features)`. Not modified.
        image_grid_thw (`torch.Tensor`): int64 `(N, 3)`, each image's patches by time, height and width.
        layout ([`PatchLayout`]): of the patches.

    Returns:
        `torch.Tensor`: a new tensor of the shape, dtype and device of `pixel_values`.
    """
    reach = 3 * layout.patch_size
    distance = torch.arange(-reach, reach + 1, device=pixel_values.device, dtype=accumulation_dtype(pixel_values))
    kernel = torch.exp(-0.5 * (distance / layout.patch_size).square())
    kernel = kernel / kernel.sum()
    blurred = torch.empty_like(pixel_values)
    for grid, places in _places_by_grid(image_grid_thw).items():
        pixels = layout.to_pixels(pixel_values[places].to(kernel.dtype), grid)
        planes = pixels.flatten(0, 2).unsqueeze(1)
        # Beyond the border the image goes on as it ends.
        planes = functional.pad(planes, (reach,) * 4, mode="replicate")
        planes = functional.conv2d(functional.conv2d(planes, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
        blurred[places] = layout.to_patches(planes.view_as(pixels)).to(blurred.dtype)
    return blurred


def other_images(
    pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, layout: PatchLayout, names: Sequence[object]
) -> torch.Tensor:
    """
    Replace each image by another image of the batch, scaled to its size.

    The batch's different images stand in a circle, in the order of their first places, and each is replaced by the
    next one. The only image of a batch becomes black.

    Args:
        pixel_values (`torch.Tensor`): float `(patches, features)`. Not modified.
        image_grid_thw (`torch.Tensor`): int64 `(N, 3)`, each image's patches by time, height and width.
        layout ([`PatchLayout`]): of the patches.
        names (`Sequence`): a name of each image, the same for equal images.

    Returns:
        `torch.Tensor`: a new tensor of the shape, dtype and device of `pixel_values`.
    """
    different = list(dict.fromkeys(names))
    if len(different) < 2:
        return _black_patch(layout).to(pixel_values).repeat(len(pixel_values), 1)
    following = dict(zip(different, different[1:] + different[:1], strict=True))
    first = {name: index for index, name in reversed(list(enumerate(names)))}
    grids = [tuple(grid) for grid in image_grid_thw.tolist()]
    starts = torch.cumsum(image_grid_thw.prod(-1), 0).tolist()
    result = torch.empty_like(pixel_values)
    for name in different:  # once an image, however often it is in the batch
        source = first[following[name]]
        end, size = starts[source], grids[source][0] * grids[source][1] * grids[source][2]
        pixels = layout.to_pixels(pixel_values[end - size : end].unsqueeze(0), grids[source])[:, :1]
        time, height, width = grids[first[name]]
        frames = time * layout.temporal_patch_size
        target = (height * layout.patch_size, width * layout.patch_size)
        scaled = functional.interpolate(pixels[0].float(), size=target, mode="bilinear", antialias=True)
        scaled = layout.to_patches(scaled.unsqueeze(0).expand(-1, frames, -1, -1, -1).contiguous())[0]
        places = [
            torch.arange(starts[index] - len(scaled), starts[index])
            for index, other in enumerate(names)
            if other == name
        ]
        result[torch.cat(places)] = scaled.to(result.dtype).repeat(len(places), 1)
    return result


def _black_patch(layout: PatchLayout) -> torch.Tensor:
    return torch.tensor(layout.black).repeat_interleave(layout.features // len(layout.black))


def _places_by_grid(image_grid_thw: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
    """int64 `(N, P)` for each grid: the lines of the patches of the images with this grid."""
    places: dict[tuple[int, ...], list[torch.Tensor]] = {}
    start = 0
    for grid in map(tuple, image_grid_thw.tolist()):
        size = grid[0] * grid[1] * grid[2]
        places.setdefault(grid, []).append(torch.arange(start, start + size))
        start += size
    return {grid: torch.stack(lines) for grid, lines in places.items()}
