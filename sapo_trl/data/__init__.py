"""Data sets in the form that TRL trains on."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .cleaning import clean_prompts
    from .columns import own_columns
    from .formats import FORMATS
    from .images import ImageLimits
    from .loading import load_rows
    from .prompts import geometry_prompt, to_prompts
    from .question import DataFormat, Question
    from .report import CleaningReport, save_reports
    from .templates import TEMPLATES


__all__ = [
    "FORMATS",
    "TEMPLATES",
    "CleaningReport",
    "DataFormat",
    "ImageLimits",
    "Question",
    "clean_prompts",
    "geometry_prompt",
    "load_rows",
    "own_columns",
    "save_reports",
    "to_prompts",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CleaningReport": "report",
        "DataFormat": "question",
        "FORMATS": "formats",
        "ImageLimits": "images",
        "Question": "question",
        "TEMPLATES": "templates",
        "clean_prompts": "cleaning",
        "geometry_prompt": "prompts",
        "load_rows": "loading",
        "own_columns": "columns",
        "save_reports": "report",
        "to_prompts": "prompts",
    },
)
