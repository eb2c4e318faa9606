"""
The features of images, computed once a rollout where a model's vision tower is frozen.

An image goes through the tower again and again: for each response to its prompt, when these are scored by the policy,
a reference and a critic, and in every forward that is trained on. Of a frozen tower all of that gives the same. (Where
gradient checkpointing makes embeddings require gradients, as transformers does for patches too, there is also a
backward through the whole tower, for nothing.)
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


class ImageFeatures:
    """
    Features of the images of one rollout, for models that take patches and their grids, as Qwen's do.

    Images are told apart by what is in them, so that it does not matter how a rollout's rows are shuffled and split,
    nor whether somebody has changed the pixels. Nothing is kept of a tower that learns or has adapters.

    Args:
        autocast (`Callable`, *optional*): makes the context in which models compute.
    """

    def __init__(self, autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext):
        self.autocast = autocast
        self._features: dict[tuple[int, ...], ModelOutput] = {}
        self._is_usable: dict[int, bool] = {}

    def clear(self) -> None:
        """Forget all features, and which towers are frozen: for the beginning of a rollout."""
        self._features.clear()
        self._is_usable.clear()

    @torch.no_grad()
    def in_place_of_pixels(self, backbone: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
        """
        Inputs that give the same outputs and do not go through a frozen tower more than once a rollout.

        Args:
            backbone ([`~transformers.PreTrainedModel`]): the model under the LM head, or under a critic's head.
            inputs (`dict`): what it is to be given.

        Returns:
            `dict`: with `mm_encoder_outputs` in the place of `pixel_values`; as they are if there are no images, or
            the tower is not frozen, or the model does not take its features.
        """
        pixel_values, grids = inputs.get("pixel_values"), inputs.get("image_grid_thw")
        if pixel_values is None or grids is None:
            return inputs
        if id(backbone) not in self._is_usable:
            self._is_usable[id(backbone)] = takes_features(backbone) and has_frozen_tower(backbone)
        if not self._is_usable[id(backbone)]:
            return inputs

        images = [(id(backbone), *key) for key in image_keys(pixel_values, grids)]
        first_places = {image: place for place, image in reversed(list(enumerate(images)))}
        new = {image: place for image, place in first_places.items() if image not in self._features}
        if new:
            patches = pixel_values.split([time * height * width for *_, time, height, width in images])
            places = list(new.values())
            with self.autocast():
                output = backbone.get_image_features(
                    torch.cat([patches[place] for place in places]), grids[places], return_dict=True
                )
            by_image = _by_image(output, len(places))
            if by_image is None:
                self._is_usable[id(backbone)] = False
                return inputs
            self._features.update(zip(new, by_image, strict=True))
        inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
        inputs["mm_encoder_outputs"] = {"image": _together([self._features[image] for image in images])}
        return inputs


def image_keys(pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> list[tuple[int, int, int, int]]:
    """
    What tells images apart: a hash of their pixels, and their grids.

    The hash is a sum of the pixels' bits times random odd numbers, modulo 2^64: of any order of summation exactly the
    same, and of two given images the same with a probability of about 2^-40 at most.

    Args:
        pixel_values (`torch.Tensor`): float `(P, D)`, the patches of all images, one image after the other.
        image_grid_thw (`torch.Tensor`): int64 `(N, 3)`, each image's patches by time, height and width.

    Returns:
        `list[tuple[int, int, int, int]]`: hash, time, height and width of each image.
    """
    device, integer = pixel_values.device, {2: torch.int16, 4: torch.int32, 8: torch.int64}[pixel_values.itemsize]
    sizes = image_grid_thw.prod(-1)
    image = torch.repeat_interleave(sizes, output_size=len(pixel_values))
    place = torch.arange(len(pixel_values), device=device) - (sizes.cumsum(0) - sizes)[image]
    bits = pixel_values.detach().contiguous().view(integer).long()
    by_patch = (bits * _odd_numbers(bits.size(1), 0, device)).sum(1) * _odd_numbers(len(bits), 1, device)[place]
    hashes = torch.zeros(len(sizes), dtype=torch.int64, device=device).index_add_(0, image, by_patch)
    # The tower's own forward reads the grids from the device as well.
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
    of_decoder = {id(module) for module in backbone.get_decoder().modules()}
    for module in backbone.modules():
        if id(module) in of_decoder:
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            return False
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            return False
        if (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "attention_dropout", 0.0) > 0:
            return False
    return True


def _odd_numbers(count: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Odd: a single bit that differs is never multiplied away.
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1).to(device)


def _by_image(output: ModelOutput, count: int) -> list[ModelOutput] | None:
    """A tower's output image by image, of what models read of it; `None` if it does not come apart."""
    pooled, layers = output.get("pooler_output"), output.get("deepstack_features") or []
    if any(not isinstance(part, (tuple, list)) or len(part) != count for part in (pooled, *layers)):
        return None
    # Copies: as a view each image would keep those that it was computed with.
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
