"""
The features of images, computed once a rollout if a model's vision tower is frozen.

Otherwise an image goes through the tower again and again: for each response to its prompt, when the policy, a
reference and a critic score the responses, and in every forward of training. A frozen tower gives the same features
each time. Gradient checkpointing even adds a useless backward through the whole tower, if it makes embeddings require
gradients: in transformers, patches count as embeddings.
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

# Patches that are hashed at a time: hashing a whole rollout at once would take several times its memory.
_PATCHES_AT_ONCE = 4096


class ImageFeatures(TrainerCallback):
    """
    Features of the images of one rollout, for models that take patches and their grids, as Qwen's do.

    A tower that learns or has adapters is run every time: its features are not kept. Other features stay on the device
    until the next rollout begins or training ends.
    """

    def __init__(self):
        self._features: dict[int, dict[ImageKey, ModelOutput]] = {}
        self._is_frozen: dict[int, bool] = {}
        self._comes_apart: dict[int, bool] = {}

    def on_train_end(self, args, state, control, **kwargs):
        self.clear()

    def clear(self) -> None:
        """Forget all features, and which towers are frozen. Called at the beginning of a rollout."""
        self._features.clear()
        self._is_frozen.clear()

    def forget(self, backbone: PreTrainedModel) -> None:
        """Forget the features of a model that will not be given these images again."""
        self._features.pop(id(backbone), None)

    def are_kept_of(self, backbone: PreTrainedModel) -> bool:
        """Whether a model takes features, its tower is frozen, and the tower's output can be split by image."""
        if id(backbone) not in self._is_frozen:
            self._is_frozen[id(backbone)] = takes_features(backbone) and has_frozen_tower(backbone)
        return self._is_frozen[id(backbone)] and self._comes_apart.get(id(backbone), True)

    @torch.no_grad()
    def in_place_of_pixels(
        self, backbone: PreTrainedModel, inputs: dict[str, Any], keys: Sequence[ImageKey]
    ) -> dict[str, Any]:
        """
        Replace pixels by features. The outputs stay the same; an image goes through a frozen tower once a rollout.

        Args:
            backbone ([`~transformers.PreTrainedModel`]): the model under the LM head, or under a critic's head.
            inputs (`dict`): its inputs.
            keys (`Sequence[ImageKey]`): keys of the images, see [`image_keys`].

        Returns:
            `dict`: the inputs with `mm_encoder_outputs` instead of `pixel_values`. They come back unchanged without
            images, with videos, or if [`ImageFeatures.are_kept_of`] is `False` for the model.
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
    A key for each image.

    The hash multiplies a pixel's bits by a random odd number that depends on the pixel's place, mixes them, and adds
    them up modulo 2^64. The sum is exactly the same in any order of summation. Two given images that differ have the
    same hash with a probability of the order of 2^-60.

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
    """Whether a model makes features of patches and their grids, and its forward takes features as inputs."""
    make = getattr(backbone, "get_image_features", None)
    return (
        make is not None
        and "image_grid_thw" in inspect.signature(make).parameters
        and "mm_encoder_outputs" in inspect.signature(backbone.forward).parameters
    )


def has_frozen_tower(backbone: PreTrainedModel) -> bool:
    """Whether no module in front of a model's decoder learns, has adapters or is random."""
    decoder = backbone.get_decoder()
    if decoder is backbone:  # a tower cannot be told from the decoder
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
    """Integers `(P, C)`: the bits of `(P, D)`. Each integer holds as many neighbouring numbers as fit."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return x.contiguous().view(next(integers[size] for size in integers if x.size(1) * x.itemsize % size == 0))


def _odd_numbers(count: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Odd numbers have an inverse modulo 2^64, so a product with them loses no bit that differs.
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1).to(device)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """int64 of the same shape: every bit depends on all bits below it and some bits above it. Overwrites `x`."""
    x ^= x >> 32
    x *= 0x1F3D5B79_97B5D3F1
    x ^= x >> 29
    return x


def _by_image(output: ModelOutput, count: int) -> list[ModelOutput] | None:
    """Split a tower's output by image, keeping only the parts that models read; `None` if it cannot be split."""
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
