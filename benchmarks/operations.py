"""
A count of floating-point operations. It needs no clock and is the same each time.

PyTorch's counter counts matrix products, convolutions and attention. A multiplication with its addition is two
operations. Attention counts whole squares, also where a mask leaves half of a square out: some kernels skip that half.
Forwards that gradient checkpointing repeats count again. Elementwise operations (norms, activations, softmax,
optimizers) are not counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _product_in_place(total: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention_forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# PyTorch's counter takes operations for free that it does not know: attention on a CPU, and products in place, such as
# the gradients in TRL's LM head.
_FURTHER_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.addmm_: _product_in_place,
}


class OperationCounter(FlopCounterMode):
    """
    Counts the operations inside, on GPUs, CPUs and the meta device.

    ```python
    >>> with OperationCounter() as counter:
    ...     loss(model(inputs)).backward()
    >>> counter.total
    ```
    """

    def __init__(self):
        super().__init__(display=False, custom_mapping=_FURTHER_FORMULAS)

    @property
    def total(self) -> int:
        """Operations so far."""
        return self.get_total_flops()
