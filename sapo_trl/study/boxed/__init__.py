"""The demo's task: the study's gates, with the answer in a box. So the reward function of real data checks it."""

from .task import boxed_solution, build_boxed_processor, longest_response, warm_start, warm_start_config


__all__ = [
    "boxed_solution",
    "build_boxed_processor",
    "longest_response",
    "warm_start",
    "warm_start_config",
]
