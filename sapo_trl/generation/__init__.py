"""Responses from a sampler outside of the trainer's process."""

from .http_client import SamplerError, SamplerLostError
from .vllm_server import VLLMServerRollout, train_with_checkpoint


__all__ = ["SamplerError", "SamplerLostError", "VLLMServerRollout", "train_with_checkpoint"]
