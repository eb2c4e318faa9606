"""Rows of data sets as bytes, numbers and strings alone: reading a file of them runs no code."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image


_IMAGE = "__png__"


def to_portable(value: Any) -> Any:
    """
    Replace images by their bytes, without loss.

    Args:
        value (`Any`): tensors, numbers, strings, images and containers of them.

    Returns:
        `Any`: the same without images, see [`from_portable`].

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return {_IMAGE: buffer.getvalue()}
    if isinstance(value, dict):
        return {key: to_portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_portable(item) for item in value]
    if value is None or isinstance(value, str | bytes | bool | int | float | torch.Tensor):
        return value
    raise TypeError(f"A value of type {type(value).__name__} cannot be written to a checkpoint: {value!r}.")


def from_portable(value: Any) -> Any:
    """Undo [`to_portable`]; tuples have become lists."""
    if isinstance(value, dict):
        if value.keys() == {_IMAGE}:
            image = Image.open(io.BytesIO(value[_IMAGE]))
            image.load()
            return image
        return {key: from_portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_portable(item) for item in value]
    return value
