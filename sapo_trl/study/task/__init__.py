"""
The study's task family: chains of gates whose outcome depends on every decision, in a picture or as text.

A gate's sign means one of four cells. Opening the gate takes that cell's number, and the numbers of all gates are the
answer. The policy must find out the signs' meanings from its outcomes.
"""

from .config import TaskConfig
from .evaluation import TaskEvaluation, code_reward, evaluate_task, longest_response
from .log_odds import LogOdds, exact_values, log_odds
from .model import ModelSize, build_model
from .oracle_cuts import OracleSegmenter
from .problems import Problem, World, make_problems, sample_problems, world_of
from .prompts import encode_prompts, to_task_prompts
from .solutions import believed_cells, believed_numbers, write_solution
from .steps import SolutionSteps, Step, read_steps
from .tokenizer import build_tokenizer
from .warm_start import WarmStartConfig, WarmStartProgress, build_task_processor, warm_start


__all__ = [
    "LogOdds",
    "ModelSize",
    "OracleSegmenter",
    "Problem",
    "SolutionSteps",
    "Step",
    "TaskConfig",
    "TaskEvaluation",
    "WarmStartConfig",
    "WarmStartProgress",
    "World",
    "believed_cells",
    "believed_numbers",
    "build_model",
    "build_task_processor",
    "build_tokenizer",
    "code_reward",
    "encode_prompts",
    "evaluate_task",
    "exact_values",
    "log_odds",
    "longest_response",
    "make_problems",
    "read_steps",
    "sample_problems",
    "to_task_prompts",
    "warm_start",
    "world_of",
    "write_solution",
]
