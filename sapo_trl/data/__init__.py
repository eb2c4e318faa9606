"""Data sets in the form that TRL trains on."""

from .cleaning import clean_prompts
from .formats import FORMATS
from .images import ImageLimits
from .loading import load_rows
from .own_columns import own_columns
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
