"""Parts of a critic that do not learn."""

from __future__ import annotations

from torch import nn


def freeze_attention(model: nn.Module) -> None:
    """
    Freeze the attention layers of a transformer, of its vision tower too.

    These are the modules whose names end with `attn` or `attention`, such as `self_attn`. A norm beside them, such as
    `post_attention_layernorm`, still learns.

    Args:
        model (`nn.Module`): a backbone.

    Raises:
        ValueError: if the model has no such module.
    """
    layers = [
        module for name, module in model.named_modules() if name.split(".")[-1].lower().endswith(("attn", "attention"))
    ]
    if not layers:
        raise ValueError(
            f"`freeze_critic_attention=True`, but no module of a {type(model).__name__} has a name that ends with "
            '"attn" or "attention": it must be False.'
        )
    for layer in layers:
        layer.requires_grad_(False)
