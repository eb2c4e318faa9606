"""Tokenized prompts with their images, from which rows can be taken and to which tokens can be appended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from trl.trainer.utils import pad, split_pixel_values_by_grid, unsplit_pixel_values_by_grid


@dataclass
class TokenizedPrompts:
    """
    Prompts as a model reads them: exact token ids, never text to be tokenized again.

    Args:
        ids (`list[list[int]]`): token ids of each prompt, image placeholders expanded, without padding.
        images (`list`, *optional*): for each prompt the list of its images; `None` without any.
        fields (`dict[str, Any]`, *optional*):
            what the processor returns besides: tensors over all images of all prompts (`pixel_values`,
            `image_grid_thw`, …) and lists with one entry per token of each prompt (`mm_token_type_ids`).
    """

    ids: list[list[int]]
    images: list[list[Any] | None] | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_images(self) -> list[int]:
        """Number of images of each prompt."""
        return [0] * len(self) if self.images is None else [len(images or []) for images in self.images]

    def extended(self, rows: Sequence[int], suffixes: Sequence[list[int]]) -> TokenizedPrompts:
        """
        Prompts with tokens behind them, in any order and number.

        Args:
            rows (`Sequence[int]`): which prompts.
            suffixes (`Sequence[list[int]]`): the token ids to append to each.

        Returns:
            [`TokenizedPrompts`]: one for each of `rows`. They share the images.
        """
        fields = {}
        by_row, per_image = self._rows_of_fields()
        for name, value in by_row.items():
            taken = [value[row] for row in rows]
            if isinstance(taken[0], list):
                # Per token: what is appended is text.
                fields[name] = [[*row, *[0] * len(suffix)] for row, suffix in zip(taken, suffixes, strict=True)]
            elif name in per_image:
                fields[name] = unsplit_pixel_values_by_grid({name: taken})[name]
            else:
                fields[name] = torch.stack(taken)
        images = None if self.images is None else [self.images[row] for row in rows]
        if images is not None and not any(images):
            # Vision towers take no empty tensors: without any image these are prompts of text.
            images, fields = None, {name: value for name, value in fields.items() if isinstance(value, list)}
        return TokenizedPrompts(
            ids=[[*self.ids[row], *suffix] for row, suffix in zip(rows, suffixes, strict=True)],
            images=images,
            fields=fields,
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
            `dict[str, Any]`: `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask` (int64) and the images'
            fields.
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
        return batch

    def _rows_of_fields(self) -> tuple[dict[str, list], set[str]]:
        """Each field as a list with one entry per prompt, and which of them lie image by image."""
        tensors = {name: torch.as_tensor(value) for name, value in self.fields.items() if not isinstance(value, list)}
        lists = {name: value for name, value in self.fields.items() if isinstance(value, list)}
        # By TRL, which knows how each model family lays its images out.
        try:
            split = split_pixel_values_by_grid({**tensors, "num_images": self.num_images})
        except KeyError as error:
            raise ValueError(
                f"The images of this model family cannot be told apart by prompt without {error}, which the processor "
                "does not return: Monte-Carlo values and trees are not supported for it."
            ) from error
        del split["num_images"]
        per_image = {name for name, value in split.items() if isinstance(value, list)}
        for name, value in split.items():
            if not isinstance(value, list) and value.size(0) != len(self):
                raise ValueError(
                    f"The processor's field {name!r} of shape {tuple(value.shape)} has neither one row for each of "
                    f"the {len(self)} prompts nor a layout that TRL can split by prompt."
                )
        return {**{name: list(value) for name, value in split.items()}, **lists}, per_image
