"""Comparisons of the trainer's numbers with a reference's: a rollout, then its losses and gradients."""

import random
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.trainer.preset_references.made_up_trainer import (
    micro_batches_of,
    slope,
)
from tests.trainer.preset_references.responses import (
    ROWS_PER_MICRO_BATCH,
    ROWS_PER_STEP,
    Response,
)


EXACT = 1e-9


@dataclass
class Comparison:
    """Compares and remembers the largest difference."""

    tolerance: float
    worst: float = 0.0

    def __call__(self, found: float, expected: float, what: Any, tolerance: float | None = None) -> None:
        error = abs(found - expected) / max(1.0, abs(expected))
        assert error <= (tolerance or self.tolerance), (what, found, expected)  # NaN fails too
        if tolerance is None:
            self.worst = max(self.worst, error)


def compare_rollout(compare: Comparison, batch: dict[str, Any], rows: list[Response], with_targets: bool) -> None:
    for index, row in enumerate(rows):
        expected_ids = {t: i for i, segment in enumerate(row.segments) for t in segment}
        for t in range(batch["advantages"].size(1)):
            where = (index, t)
            assert batch["segment_ids"][index, t] == expected_ids.get(t, -1), where
            assert batch["policy_mask"][index, t] == (t in row.advantages), where
            compare(batch["advantages"][index, t].item(), row.advantages.get(t, 0.0), ("advantage", where))
            if with_targets:
                compare(batch["returns"][index, t].item(), row.targets.get(t, 0.0), ("target", where))


def compare_losses(
    compare: Comparison, trainer, reference: Any, batch: dict[str, Any], rows: list[Response], seed: int
) -> None:
    rng = random.Random(seed)
    order = rng.sample(range(len(rows)), len(rows))
    micro_batches = micro_batches_of(trainer, batch, order, rows)
    for start in range(0, len(rows), ROWS_PER_STEP):
        members = [rows[index] for index in order[start : start + ROWS_PER_STEP]]
        first = start // ROWS_PER_MICRO_BATCH
        losses, value_losses = [], []
        step = micro_batches[first : first + ROWS_PER_STEP // ROWS_PER_MICRO_BATCH]
        for micro_batch in step:
            losses.append(trainer.policy_loss(trainer.model, micro_batch))
            if trainer.critic is not None:
                value_losses.append(trainer.critic_loss(micro_batch, None))
        sum(losses).backward()
        compare(sum(losses).item(), reference.policy_loss(members), ("policy loss", start))
        if value_losses:
            sum(value_losses).backward()
            compare(sum(value_losses).item(), reference.value_loss(members), ("value loss", start))
        for index, row in enumerate(members):
            micro_batch, inner = step[index // ROWS_PER_MICRO_BATCH], index % ROWS_PER_MICRO_BATCH
            gradient = micro_batch["current_logps"].grad[inner]
            assert not gradient[len(row.ids) :].any()
            for t in rng.sample(range(len(row.ids)), min(6, len(row.ids))):
                expected = slope(partial(reference.policy_loss, members), row.new_logps, t)  # noqa: B023
                compare(
                    gradient[t].item(), expected, ("policy gradient", start, index, t), max(compare.tolerance, 1e-8)
                )
                if value_losses:
                    expected = slope(partial(reference.value_loss, members), row.new_values, t)  # noqa: B023
                    found = micro_batch["current_values"].grad[inner, t].item()
                    compare(found, expected, ("value gradient", start, index, t), max(compare.tolerance, 1e-8))
