"""Responses from a sampler outside the trainer's process."""

from .vllm_server import SamplerError, SamplerLostError, VLLMServerRollout, train_with_checkpoint


__all__ = ["SamplerError", "SamplerLostError", "VLLMServerRollout", "train_with_checkpoint"]
