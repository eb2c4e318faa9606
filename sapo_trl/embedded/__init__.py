"""A vision-language task that needs no download: tiny Qwen2.5-VL, drawn geometry problems, warm start, evaluation."""

from .evaluation import Evaluation, evaluate
from .model import build_config, build_model
from .problems import Problem, all_problems, make_problems, sample_problems
from .processor import Qwen2_5_VLImageTextProcessor, build_processor, load_processor
from .solutions import reference_solution
from .tokenizer import build_tokenizer
from .warm_start import (
    WarmStartConfig,
    WarmStartProgress,
    default_cache_dir,
    save_untrained,
    warm_start,
    warm_start_folder,
)


__all__ = [
    "Evaluation",
    "Problem",
    "Qwen2_5_VLImageTextProcessor",
    "WarmStartConfig",
    "WarmStartProgress",
    "all_problems",
    "build_config",
    "build_model",
    "build_processor",
    "build_tokenizer",
    "default_cache_dir",
    "evaluate",
    "load_processor",
    "make_problems",
    "reference_solution",
    "sample_problems",
    "save_untrained",
    "warm_start",
    "warm_start_folder",
]
