"""The dependence of a rollout's tokens on its images: one more forward of the policy, with corrupted images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import SAPOConfig
from ..distributed import Processes
from ..image_corruption import PatchLayout, blur, hide_tokens, other_images, patches_per_row
from ..metrics import Measurements
from ..role_aware import RoleAwareWeighting
from ..rollouts.types import PolicyForward, RolloutBatch
from ..visual_dependency import mean_dependency, visual_dependency
from .image_features import image_keys


_SETTINGS = '`visual_token_share`, `response_weighting`, `perception_kl_coef` and `advantage_weighting="role_aware"`'


def patch_layout(policy: PreTrainedModel, processing_class: Any) -> PatchLayout:
    """
    The form of a policy's patches.

    Args:
        policy ([`~transformers.PreTrainedModel`]): the policy.
        processing_class (`Any`): its processor.

    Raises:
        ValueError: if the policy takes no images, or lays them out in another way than Qwen's families.
    """
    vision, images = getattr(policy.config, "vision_config", None), getattr(processing_class, "image_processor", None)
    if vision is None or images is None:
        raise ValueError(
            f"{_SETTINGS} measure how far tokens depend on images, but a model of type "
            f"{policy.config.model_type!r} takes none: leave them out."
        )
    sizes = [getattr(images, name, None) for name in ("patch_size", "merge_size", "temporal_patch_size")]
    if not all(isinstance(size, int) for size in sizes) or not hasattr(vision, "spatial_merge_size"):
        raise ValueError(
            f"A model of type {policy.config.model_type!r} lays out its images in another way than Qwen's families, "
            f"whose patches alone can be corrupted: leave out {_SETTINGS}."
        )
    black, white = (0.0,) * 3, (1.0,) * 3
    if images.do_normalize:
        black, white = (
            tuple((end - mean) / std for mean, std in zip(images.image_mean, images.image_std, strict=True))
            for end in (0.0, 1.0)
        )
    return PatchLayout(*sizes, black=black, white=white)


@dataclass(frozen=True)
class CorruptedImages:
    """
    A batch's images, corrupted.

    Args:
        layout ([`~sapo_trl.image_corruption.PatchLayout`]): of the policy's patches.
        args ([`SAPOConfig`]): settings of the run.
    """

    layout: PatchLayout
    args: SAPOConfig

    def __call__(self, batch: RolloutBatch, seed: int) -> RolloutBatch:
        """The batch with corrupted images; another `seed` hides others of their tokens."""
        counts = patches_per_row(batch, len(batch["completion_ids"]))
        kind = self.args.image_corruption
        if kind == "none" or not counts.any():
            return batch
        pixels, grids = batch["pixel_values"], batch["image_grid_thw"]
        if kind == "tokens":
            pixels = hide_tokens(pixels, counts, self.layout, self.args.image_corruption_share, seed)
        elif kind == "blur":
            pixels = blur(pixels, grids, self.layout)
        else:
            pixels = other_images(pixels, grids, self.layout, image_keys(pixels, grids))
        # The keys of features that are kept belong to the original images.
        return {**{name: value for name, value in batch.items() if name != "image_keys"}, "pixel_values": pixels}

    def again(self, batch: RolloutBatch) -> RolloutBatch:
        """A micro-batch with the images as they were corrupted in its rollout."""
        return self(batch, batch["corruption_seeds"][0])


def corrupted_images(
    policy: PreTrainedModel, processing_class: Any, args: SAPOConfig, weighting: RoleAwareWeighting | None
) -> CorruptedImages | None:
    """The corruption that a configuration asks for; `None` if nothing compares images. See [`patch_layout`]."""
    if not args.compares_images and weighting is None:
        return None
    return CorruptedImages(patch_layout(policy, processing_class), args)


class CorruptedForward:
    """
    The policy's log-probabilities of a rollout with corrupted images, computed once, when they are first asked for.

    Args:
        corrupt ([`CorruptedImages`], *optional*): makes the batch with corrupted images; `None` if no setting asks.
        batch (`RolloutBatch`): the rollout.
        logps (`torch.Tensor`): float32 `(B, T)`, of the same policy with the images as they are.
        run (`Callable`): a batch to the policy's log-probabilities `(B, T)`.
        seed (`int`): hides other tokens of the images than other seeds.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the completions.
    """

    def __init__(
        self,
        corrupt: CorruptedImages | None,
        batch: RolloutBatch,
        logps: torch.Tensor,
        run: Callable[[RolloutBatch], torch.Tensor],
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.corrupt, self.batch, self.run, self.seed, self.tokenizer = corrupt, batch, run, seed, tokenizer
        self.logps = logps
        self._corrupted: torch.Tensor | None = None
        self.seconds: dict[str, float] = {}

    def __call__(self) -> torch.Tensor:
        if self._corrupted is None:
            started = time.perf_counter()
            self._corrupted = self.run(self.corrupt(self.batch, self.seed))
            self.seconds = {"corrupted_images": time.perf_counter() - started}
        return self._corrupted

    @property
    def changes_images(self) -> bool:
        """Whether a setting asks for corrupted images, and this rollout has images to corrupt."""
        is_asked_for = self.corrupt is not None and self.corrupt.args.image_corruption != "none"
        return is_asked_for and self.batch.get("pixel_values") is not None

    def pictures(self, rows: int) -> list[list[Image.Image]]:
        """The corrupted images of the first rows. They are made again: a rollout is too large to keep them."""
        batch = self.corrupt(self.batch, self.seed)
        grids = batch["image_grid_thw"].tolist()
        patches = batch["pixel_values"].split([time * height * width for time, height, width in grids])
        images = iter(zip(patches, grids, strict=True))
        return [
            [Image.fromarray(self.corrupt.layout.to_bytes(*image).numpy()) for image in islice(images, number)]
            for number in torch.as_tensor(batch["num_images"]).tolist()[:rows]
        ]


def dependency_of(
    look: CorruptedForward, mask: torch.Tensor, args: SAPOConfig
) -> tuple[torch.Tensor | None, Measurements]:
    """
    Args:
        look ([`CorruptedForward`]): of the policy with corrupted images.
        mask (`torch.Tensor`): bool `(B, T)`, the tokens that count.
        args ([`SAPOConfig`]): settings of the run.

    Returns:
        `tuple`: float32 `(B, T)`, each token's dependence on the images, 0 in rows without any; `None` if no setting
        reads it. And its mean.
    """
    if not args.reads_visual_dependency:
        return None, {}
    has_image = (patches_per_row(look.batch, len(mask)) > 0).to(mask.device).unsqueeze(1)
    # Also without a single image here: the forward of other processes may wait for this one.
    dependency = torch.where(has_image & mask, visual_dependency(look.logps, look()), 0)
    return dependency, {"visual_dependency/mean": (dependency.sum(), mask.sum())}


def looking_again(
    run: Callable[[RolloutBatch], PolicyForward], corrupt: CorruptedImages | None, batch: RolloutBatch
) -> PolicyForward:
    """
    The forward of a micro-batch, and its log-probabilities with corrupted images if its losses need their gradient.

    Args:
        run (`Callable`): runs the policy.
        corrupt ([`CorruptedImages`], *optional*): corrupts the images.
        batch (`RolloutBatch`): the micro-batch.
    """
    forward = run(batch)
    if "corruption_seeds" not in batch:
        return forward
    return replace(forward, corrupted_logps=run(corrupt.again(batch)).logps)


def columns_of_images(
    dependency: torch.Tensor | None, look: CorruptedForward, mask: torch.Tensor, args: SAPOConfig
) -> RolloutBatch:
    """The columns by which the losses compare with corrupted images, of a rollout."""
    columns: RolloutBatch = {}
    if args.response_weighting == "visual_dependency":
        columns["response_dependency"] = mean_dependency(dependency, mask)
    if args.perception_kl_coef != 0.0:
        columns["has_image"] = (patches_per_row(look.batch, len(mask)) > 0).to(mask.device)
        if args.perception_kl_gradient:
            columns["corruption_seeds"] = [look.seed] * len(mask)
        else:
            columns["corrupted_per_token_logps"] = look()
    return columns


def token_weights(
    weighting: RoleAwareWeighting | None,
    forward: PolicyForward,
    look: CorruptedForward,
    mask: torch.Tensor,
    processes: Processes,
) -> tuple[torch.Tensor | None, Measurements]:
    """
    Args:
        weighting ([`~sapo_trl.role_aware.RoleAwareWeighting`], *optional*): how to weigh tokens.
        forward ([`PolicyForward`]): of the policy with the images.
        look ([`CorruptedForward`]): of the same policy with corrupted images.
        mask (`torch.Tensor`): bool `(B, T)`, the tokens that count.
        processes ([`~sapo_trl.distributed.Processes`]): of the run.

    Returns:
        `tuple`: float32 `(B, T)`, the factor of each token's advantage, `None` without any; and its metrics.
    """
    if weighting is None:
        return None, {}
    return weighting(
        batch=look.batch,
        completion_ids=look.batch["completion_ids"],
        mask=mask,
        logps=forward.logps,
        tokenizer=look.tokenizer,
        logps_corrupted=look,
        forward=look.run,
        pad_id=look.tokenizer.pad_token_id,
        reduce=processes.sum,
    )
