"""Training in float64: what two ways to compute the same differ by there is no rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import trl.trainer.utils
from transformers import PreTrainedModel


def make_exact(model: PreTrainedModel) -> PreTrainedModel:
    """A model in float64, text models' rotary angles included: of others they do not depend on where a row lies."""
    model = model.double()
    for name, module in model.named_modules():
        if name.endswith("rotary_emb") and not hasattr(model.model, "visual"):
            module.forward = _exact_rotary(module)
    return model


@contextmanager
def exact_lm_head() -> Iterator[None]:
    """TRL's fused LM head is in float32 whatever the model is: here it is one of full logits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", _PlainHead)
        yield


class _PlainHead:
    @staticmethod
    def apply(hidden, weight, bias, labels, temperature, chunk_size, softcap, logit_scale, outputs):
        assert bias is None and softcap is None and logit_scale == 1.0
        logps = (hidden @ weight.T / temperature).log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, labels[..., None])[..., 0], entropy, None, None, None


def _exact_rotary(rotary: torch.nn.Module):
    """Angles in float64: transformers' are in float32, and differ by 1e-7 at other positions."""

    def forward(hidden_states, position_ids, **kwargs):
        angles = position_ids[..., None].double() * rotary.inv_freq.double()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    return forward
