"""What a run needs of each GPU's memory, computed from the model's configuration before anything is loaded."""

from .advice import Suggestion, suggest
from .memory import MemoryPlan, plan_memory
from .setup import Lora, Setup
from .shapes import ModelShape, model_shape


__all__ = ["Lora", "MemoryPlan", "ModelShape", "Setup", "Suggestion", "model_shape", "plan_memory", "suggest"]
