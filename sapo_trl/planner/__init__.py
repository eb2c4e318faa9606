"""The memory that a run needs on each GPU, computed from the model's configuration before anything is loaded."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .advice import Suggestion, suggest
    from .memory import MemoryPlan, plan_memory
    from .setup import Lora, Setup
    from .shapes import ModelShape, model_shape


__all__ = ["Lora", "MemoryPlan", "ModelShape", "Setup", "Suggestion", "model_shape", "plan_memory", "suggest"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Lora": "setup",
        "MemoryPlan": "memory",
        "ModelShape": "shapes",
        "Setup": "setup",
        "Suggestion": "advice",
        "model_shape": "shapes",
        "plan_memory": "memory",
        "suggest": "advice",
    },
)
