"""Tokenized prompts with their images, from which rows can be taken and to which tokens can be appended."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from trl.trainer.utils import pad


def has_images_by_row(batch: Mapping[str, Any]) -> bool:
    """
    Whether a prompt's images are padded to one row of the batch, as by Idefics' processor.

    A prompt without images has a row of zeros.

    Args:
        batch (`Mapping[str, Any]`): the processor's output, perhaps among other tensors; `None` counts as absent.
    """
    return batch.get("pixel_attention_mask") is not None and batch.get("spatial_shapes") is None


def one_entry_a_row(batch: Mapping[str, Any]) -> list[int]:
    """
    Number of entries of `pixel_values` for each row, if a prompt's images are padded to one row of the batch.

    TRL recognises this layout by the number of entries. If there are as many images as rows, TRL would mistake the
    rows for images.
    """
    return [1] * len(batch["pixel_values"])


@dataclass
class TokenizedPrompts:
    """
    Prompts as a model reads them: exact token ids, never text to be tokenized again.

    Args:
        ids (`list[list[int]]`): token ids of each prompt, image placeholders expanded, without padding.
        images (`list`, *optional*): for each prompt the list of its images; `None` without any.
        fields (`dict[str, Any]`, *optional*):
            the processor's other outputs: lists with one number per token of each prompt (`mm_token_type_ids`),
            and tensors, arrays or lists with entries for all images of all prompts (`pixel_values`, `image_grid_thw`,
            `image_sizes`, …). An image has one entry, or several patches or tiles.
        placeholders (`Collection[int]`, *optional*): tokens that stand for a piece of an image.
    """

    ids: list[list[int]]
    images: list[list[Any] | None] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    placeholders: Collection[int] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_images(self) -> list[int]:
        """Number of images of each prompt."""
        return [0] * len(self) if self.images is None else [len(images or []) for images in self.images]

    def extended(self, rows: Sequence[int], suffixes: Sequence[list[int]]) -> TokenizedPrompts:
        """
        Append tokens to prompts, in any order and number.

        Args:
            rows (`Sequence[int]`): which prompts.
            suffixes (`Sequence[list[int]]`): the token ids to append to each.

        Returns:
            [`TokenizedPrompts`]: one for each of `rows`. They share the images.
        """
        by_token, by_row = self._rows_of_fields
        # Appended tokens are text: their numbers are 0.
        fields = {
            name: [[*value[row], *[0] * len(suffix)] for row, suffix in zip(rows, suffixes, strict=True)]
            for name, value in by_token.items()
        }
        images = None if self.images is None else [self.images[row] for row in rows]
        if images is not None and not any(images):
            # Vision towers take no empty tensors: prompts without any image become prompts of text.
            images = None
        else:
            fields |= {name: torch.cat([value[row] for row in rows]) for name, value in by_row.items()}
        return TokenizedPrompts(
            ids=[[*self.ids[row], *suffix] for row, suffix in zip(rows, suffixes, strict=True)],
            images=images,
            fields=fields,
            placeholders=self.placeholders,
        )

    def model_inputs(
        self, rows: Sequence[int], completions: Sequence[list[int]], pad_token_id: int, device: torch.device
    ) -> dict[str, Any]:
        """
        A batch as the policy's forward takes it: prompts padded on the left, completions on the right.

        Args:
            rows (`Sequence[int]`): which prompts.
            completions (`Sequence[list[int]]`): token ids of one completion for each.
            pad_token_id (`int`): token to pad with.
            device (`torch.device`): where to put the tensors.

        Returns:
            `dict[str, Any]`: `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask` (int64), the images'
            fields, and the lists `num_images` and, where images come in tiles, `num_tiles`.
        """
        chosen = self.extended(rows, [[]] * len(rows))

        def padded(lists: Sequence[list[int]], side: str, value: int) -> torch.Tensor:
            return pad([torch.tensor(ids, dtype=torch.long) for ids in lists], padding_value=value, padding_side=side)

        batch = {
            "prompt_ids": padded(chosen.ids, "left", pad_token_id),
            "prompt_mask": padded([[1] * len(ids) for ids in chosen.ids], "left", 0),
            "completion_ids": padded(completions, "right", pad_token_id),
            "completion_mask": padded([[1] * len(ids) for ids in completions], "right", 0),
        }
        for name, value in chosen.fields.items():
            if isinstance(value, list):
                value = padded(value, "left", 0)
                # Completions are text.
                value = torch.nn.functional.pad(value, (0, batch["completion_ids"].size(1)))
            batch[name] = value
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        if chosen.images is not None:
            batch["num_images"] = chosen.num_images
            if (num_tiles := chosen._num_tiles) is not None:
                batch["num_tiles"] = num_tiles
        return batch

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are not per token, each as one tensor."""
        return {name: _as_tensor(name, value) for name, value in self.fields.items() if not self._is_by_token(value)}

    @cached_property
    def _num_tiles(self) -> list[int] | None:
        """Number of tiles of each prompt's images; `None` if an image is one entry or the layout has no tiles."""
        pixel_values, total = self._tensors.get("pixel_values"), sum(self.num_images)
        if pixel_values is None or len(pixel_values) == total or "image_grid_thw" in self._tensors:
            return None
        if len(pixel_values) == len(self) and (has_images_by_row(self._tensors) or pixel_values.ndim == 5):
            return None
        # All tiles have equally many placeholders, so the placeholders of a prompt count its tiles.
        counts = [sum(ids.count(token) for token in self.placeholders) for ids in self.ids]
        per_tile, rest = divmod(sum(counts), len(pixel_values))
        if "spatial_shapes" in self._tensors or per_tile == 0 or rest or any(count % per_tile for count in counts):
            raise ValueError(
                f"The processor returns {len(pixel_values)} entries of 'pixel_values' for the {total} image(s) of "
                f"{len(self)} prompts with {counts} image tokens: the images of this model family cannot be told "
                "apart by prompt. Monte-Carlo values and trees are not supported for it: choose another `critic`."
            )
        return [count // per_tile for count in counts]

    @cached_property
    def _rows_of_fields(self) -> tuple[dict[str, list[list[int]]], dict[str, list[torch.Tensor]]]:
        """Fields with one entry for each prompt: the lists per token, and each prompt's part of the tensors."""
        by_token = {name: value for name, value in self.fields.items() if name not in self._tensors}
        by_row = {name: list(value.split(self._sections(name))) for name, value in self._tensors.items()}
        return by_token, by_row

    def _is_by_token(self, value: Any) -> bool:
        if not isinstance(value, list) or len(value) != len(self):
            return False
        return all(isinstance(row, list) and len(row) == len(ids) for row, ids in zip(value, self.ids, strict=True))

    def _sections(self, name: str) -> list[int]:
        """Entries of each prompt in one of the tensors."""
        value, num_images = self._tensors[name], self.num_images
        if name == "pixel_values" and "image_grid_thw" in self._tensors:
            patches = [0, *accumulate(self._tensors["image_grid_thw"].prod(-1).tolist())]
            images = [0, *accumulate(num_images)]
            return [patches[end] - patches[start] for start, end in pairwise(images)]
        by_row = has_images_by_row(self._tensors) and name in ("pixel_values", "pixel_attention_mask")
        if not by_row and len(value) == sum(num_images):
            return num_images
        if self._num_tiles is not None and len(value) == sum(self._num_tiles):
            return self._num_tiles
        if len(value) == len(self):
            return [1] * len(self)
        raise ValueError(
            f"The processor's field {name!r} of shape {tuple(value.shape)} has neither one row for each of the "
            f"{len(self)} prompts nor one for each of their {sum(num_images)} images: Monte-Carlo values and trees "
            "are not supported for this model family, choose another `critic`."
        )


def _as_tensor(name: str, value: Any) -> torch.Tensor:
    """Make one tensor of a tensor, an array, or a list of tensors or arrays, one for each image or tile."""
    if not isinstance(value, (list, tuple)):
        return torch.as_tensor(value)
    entries = [torch.as_tensor(entry) for entry in value]
    shapes = {tuple(entry.shape) for entry in entries}
    if len(shapes) > 1:
        raise ValueError(
            f"The processor's field {name!r} has entries of different shapes, {sorted(shapes)}, which no model takes "
            "together: let the image processor resize or pad them (`do_resize`, `do_pad`)."
        )
    return torch.stack(entries)
