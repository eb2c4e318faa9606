"""The example in the docstring of `RolloutCallback`, run as printed."""

import re
import textwrap
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from sapo_trl import RolloutCallback, Segments
from sapo_trl.metrics import MetricAccumulator


def test_the_example_measures_what_it_says():
    added = []
    (block,) = re.findall(r"```python\n(.*?)```", RolloutCallback.__doc__, re.DOTALL)
    exec(textwrap.dedent(block), {"trainer": SimpleNamespace(add_callback=added.append)})
    metrics = MetricAccumulator()
    rollout = SimpleNamespace(segments=Segments(torch.tensor([[0, 0, 0, 1, -1], [0, 1, 2, 2, 2]])))
    added[0].on_rollout(None, None, None, rollout, metrics)
    assert metrics.flush(Accelerator(cpu=True)) == {"tokens_per_segment": pytest.approx(9 / 5)}
