"""The optimizer step in progress: the measurements that it keeps, and their way to the log."""

from types import SimpleNamespace

import pytest
import torch

from sapo_trl import Segments
from sapo_trl.losses import clipped_policy_loss, masked_policy_loss, soft_adaptive_policy_loss
from sapo_trl.trainer.step import MicroBatchLoss, StepInProgress, StepTotals, combined
from sapo_trl.trainer.update import POLICY_METRICS, SEGMENT_RATIO_METRICS


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
    logged = combined(outputs, ALONE, {"critic/learning_rate": (torch.tensor(0.25), 1.0)})
    assert logged == pytest.approx({"entropy": 8 / 8, "critic/learning_rate": 0.25, "ratio/max": 5.0})
    assert combined(outputs[:1], ALONE) == pytest.approx({"entropy": 6 / 3, "ratio/max": 5.0})  # nothing is left over


@pytest.mark.parametrize("loss", [clipped_policy_loss, masked_policy_loss, soft_adaptive_policy_loss])
def test_every_metric_of_a_policy_loss_has_a_name_in_the_log(loss):
    """A metric without a name would be dropped without a word."""
    logps, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    metrics = loss(logps, logps, logps, mask, segments=Segments.from_last_tokens(mask, mask)).metrics
    assert "ratio_mean" in metrics
    # The largest ratio is the micro-batch's maximum, not a mean.
    assert metrics.keys() - {"ratio_max"} <= POLICY_METRICS.keys() | SEGMENT_RATIO_METRICS.keys()


def test_an_unknown_aggregation_is_an_error():
    one = torch.tensor(1.0)
    own = {"own_tokens": one, "own_segments": one, "own_read_tokens": one}
    totals = StepTotals(one, one, one, one, rows=2, micro_batches=1, **own)
    with pytest.raises(ValueError, match="'seq-max' has no denominator"):
        totals.normalizer("seq-max", "tokens", 4)
