"""The optimizer step in progress: the measurements that it keeps, and their way to the log."""

from types import SimpleNamespace

import pytest
import torch

from sapo_trl.trainer.step import MicroBatchLoss, StepInProgress, combined


ALONE = SimpleNamespace(device=torch.device("cpu"), reduce=lambda x, reduction: x, gather=lambda x: x)


def a_loss(value: float, total: float, count: float, largest: float) -> MicroBatchLoss:
    parameter = torch.tensor(value, requires_grad=True)
    maxima = {"ratio/max": parameter * largest}
    return MicroBatchLoss(parameter * 2, {"entropy": (torch.tensor(total), count)}, maxima)


def test_a_step_keeps_measurements_without_their_graphs():
    empty = StepInProgress(batches=[], totals=None, micro_batch={})
    step = empty.measured(a_loss(1.0, 6.0, 3.0, 5.0)).measured(a_loss(1.0, 2.0, 1.0, 4.0))
    assert empty.outputs == () and len(step.outputs) == 2
    kept = [tensor for output in step.outputs for tensor in (output.loss, output.maxima["ratio/max"])]
    assert [tensor.item() for tensor in kept] == [2.0, 5.0, 2.0, 4.0]
    assert not any(tensor.requires_grad for tensor in kept)


def test_means_are_over_all_items_and_maxima_over_all_losses():
    outputs = [a_loss(1.0, 6.0, 3.0, 5.0), a_loss(1.0, 2.0, 5.0, 4.0)]
    logged = combined(outputs, ALONE, {"critic_lr": (torch.tensor(0.25), 1.0)})
    assert logged == pytest.approx({"entropy": 8 / 8, "critic_lr": 0.25, "ratio/max": 5.0})
    assert combined(outputs[:1], ALONE) == pytest.approx({"entropy": 6 / 3, "ratio/max": 5.0})  # nothing is left over
