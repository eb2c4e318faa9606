"""Loads the backbone of a critic from a checkpoint, which may be a whole policy's."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoModel, PreTrainedModel


# The problems that transformers reports after loading, except for weights that the model has no use for.
_PROBLEMS = ("MISSING", "MISMATCH", "CONVERSION")


def load_backbone(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """
    Load a model without its head. That the checkpoint has a head of a language model is no news, so it is not logged.

    Args:
        path (`str` or `Path`): folder or hub id.
        kwargs: passed to [`~transformers.AutoModel.from_pretrained`].

    Returns:
        [`~transformers.PreTrainedModel`]
    """
    with _without_reports_on_unused_weights():
        return AutoModel.from_pretrained(path, **kwargs)


@contextlib.contextmanager
def _without_reports_on_unused_weights() -> Iterator[None]:
    def is_news(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or any(problem in text for problem in _PROBLEMS)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)
