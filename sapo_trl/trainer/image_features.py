"""
The features of images, computed once a rollout where a model's vision tower is frozen.

An image goes through the tower again and again: for each response to its prompt, when these are scored by the policy,
a reference and a critic, and in every forward that is trained on. Of a frozen tower all of that gives the same. (Where
gradient checkpointing makes embeddings require gradients, as transformers does for patches too, there is also a
backward through the whole tower, for nothing.)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import ModelOutput


# Tells images apart: a hash of the pixels, and the grid of patches.
ImageKey = tuple[int, int, int, int]

# Patches that are hashed at a time: a rollout's at once would take several times their memory.
_PATCHES_AT_ONCE = 4096


class ImageFeatures(TrainerCallback):
    """
    Features of the images of one rollout, for models that take patches and their grids, as Qwen's do.

    Nothing is kept of a tower that learns or has adapters. Features stay on the device until the next rollout
    (and of an evaluation's rollout until it has ended).
    """

    def __init__(self):
        self._features: dict[int, dict[ImageKey, ModelOutput]] = {}
        self._is_frozen: dict[int, bool] = {}
        self._comes_apart: dict[int, bool] = {}

    def on_train_end(self, args, state, control, **kwargs):
        self.clear()

    def clear(self) -> None:
        """Forget all features, and which towers are frozen: for the beginning of a rollout."""
        self._features.clear()
        self._is_frozen.clear()

    def forget(self, backbone: PreTrainedModel) -> None:
        """Forget a model's features: for one that will not be given these images again."""
        self._features.pop(id(backbone), None)

    def are_kept_of(self, backbone: PreTrainedModel) -> bool:
        """Whether a model takes features, and comes to them by a tower that is frozen."""
        if id(backbone) not in self._is_frozen:
            self._is_frozen[id(backbone)] = takes_features(backbone) and has_frozen_tower(backbone)
        return self._is_frozen[id(backbone)] and self._comes_apart.get(id(backbone), True)

    @torch.no_grad()
    def in_place_of_pixels(
        self, backbone: PreTrainedModel, inputs: dict[str, Any], keys: Sequence[ImageKey]
    ) -> dict[str, Any]:
        """
        Inputs that give the same outputs and do not go through a frozen tower more than once a rollout.

        Args:
            backbone ([`~transformers.PreTrainedModel`]): the model under the LM head, or under a critic's head.
            inputs (`dict`): its inputs.
            keys (`Sequence[ImageKey]`): of its images, see [`image_keys`].

        Returns:
            `dict`: with `mm_encoder_outputs` in the place of `pixel_values`; as they are if there are no images (or
            videos beside them), or [`ImageFeatures.are_kept_of`] the model not.
        """
        has_images = inputs.get("pixel_values") is not None and inputs.get("image_grid_thw") is not None
        if not has_images or inputs.get("pixel_values_videos") is not None or not self.are_kept_of(backbone):
            return inputs
        known = self._features.setdefault(id(backbone), {})
        places: dict[ImageKey, int] = {}
        for place, key in enumerate(keys):
            if key not in known:
                places.setdefault(key, place)
        if places:
            patches = inputs["pixel_values"].split([time * height * width for _, time, height, width in keys])
            output = backbone.get_image_features(
                torch.cat([patches[place] for place in places.values()]),
                inputs["image_grid_thw"][list(places.values())],
                return_dict=True,
            )
            by_image = _by_image(output, len(places))
            self._comes_apart[id(backbone)] = by_image is not None
            if by_image is None:
                return inputs
            known.update(zip(places, by_image, strict=True))
        inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
        inputs["mm_encoder_outputs"] = {"image": _together([known[key] for key in keys])}
        return inputs


def image_keys(pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> list[ImageKey]:
    """
    A key of each image.

    A pixel's bits are multiplied by a random odd number of its place, mixed, and added up modulo 2^64: in any order of
    summation the sum is exactly the same. Of two given images that differ it is by a chance of the order of 2^-60.

    Args:
        pixel_values (`torch.Tensor`): `(P, …)`, the patches of all images, one image after the other.
        image_grid_thw (`torch.Tensor`): int64 `(N, 3)`, each image's patches by time, height and width.

    Returns:
        `list[tuple[int, int, int, int]]`: hash, time, height and width of each image.
    """
    device, sizes = pixel_values.device, image_grid_thw.prod(-1)
    bits = _as_integers(pixel_values.detach().flatten(1))
    columns, rows = (_odd_numbers(bits.size(1 - dim), dim, device) for dim in (0, 1))
    image = torch.repeat_interleave(sizes, output_size=len(bits))
    place = torch.arange(len(bits), device=device) - (sizes.cumsum(0) - sizes)[image]
    by_patch = torch.cat([_mixed(block.long() * columns).sum(1) for block in bits.split(_PATCHES_AT_ONCE)])
    by_patch = _mixed(by_patch * rows[place])
    hashes = torch.zeros(len(sizes), dtype=torch.int64, device=device).index_add_(0, image, by_patch)
    return [tuple(key) for key in torch.cat([hashes[:, None], image_grid_thw], dim=1).tolist()]


def takes_features(backbone: PreTrainedModel) -> bool:
    """Whether a model makes features of patches and their grids, and can be given them."""
    make = getattr(backbone, "get_image_features", None)
    return (
        make is not None
        and "image_grid_thw" in inspect.signature(make).parameters
        and "mm_encoder_outputs" in inspect.signature(backbone.forward).parameters
    )


def has_frozen_tower(backbone: PreTrainedModel) -> bool:
    """Whether nothing in front of a model's decoder learns, has adapters or is random."""
    decoder = backbone.get_decoder()
    if decoder is backbone:  # none that could be told from what is in front of it
        return False
    of_decoder = {id(module) for module in decoder.modules()}
    for module in backbone.modules():
        if id(module) in of_decoder:
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            return False
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            return False
        rates = (getattr(module, name, 0.0) for name in ("dropout", "attention_dropout"))
        if (isinstance(module, nn.Dropout) and module.p > 0) or any(isinstance(r, float) and r > 0 for r in rates):
            return False
    return True


def _as_integers(x: torch.Tensor) -> torch.Tensor:
    """Integers `(P, C)`: the bits of `(P, D)`, of as many numbers at a time as fit into one."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return x.contiguous().view(next(integers[size] for size in integers if x.size(1) * x.itemsize % size == 0))


def _odd_numbers(count: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Odd: a single bit that differs is never multiplied away.
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1).to(device)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """int64 of the same shape (`x` is used up): every bit depends on those below it and, halfway, above it."""
    x ^= x >> 32
    x *= 0x1F3D5B79_97B5D3F1
    x ^= x >> 29
    return x


def _by_image(output: ModelOutput, count: int) -> list[ModelOutput] | None:
    """A tower's output image by image, of what models read of it; `None` if it does not come apart."""
    pooled, layers = output.get("pooler_output"), output.get("deepstack_features") or []
    if any(not isinstance(part, (tuple, list)) or len(part) != count for part in (pooled, *layers)):
        return None
    # Clone: a view would keep the whole batch of images alive.
    return [
        type(output)(
            pooler_output=[pooled[number].clone()],
            **({"deepstack_features": [[layer[number].clone()] for layer in layers]} if layers else {}),
        )
        for number in range(count)
    ]


def _together(outputs: list[ModelOutput]) -> ModelOutput:
    """One output for several images, in their order."""
    parts = {"pooler_output": [features for output in outputs for features in output.pooler_output]}
    layers = list(zip(*(output.get("deepstack_features") or [] for output in outputs), strict=True))
    if layers:
        parts["deepstack_features"] = [[features for each in layer for features in each] for layer in layers]
    return type(outputs[0])(**parts)
