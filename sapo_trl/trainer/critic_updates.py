"""Further updates of the critic on the micro-batches of an optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from ..config import SAPOConfig
from ..critic.training import Critic
from ..rollouts.types import RolloutBatch
from .step_guard import StepGuard


logger = logging.getLogger(__name__)


def further_updates(
    critic: Critic,
    args: SAPOConfig,
    batches: list[RolloutBatch],
    loss_of: Callable[[RolloutBatch], torch.Tensor],
    guard: StepGuard,
) -> None:
    """
    Update the critic again, with the same targets. Its learning rate schedule counts the policy's steps.

    Args:
        critic ([`~sapo_trl.critic.training.Critic`]): the critic.
        args ([`SAPOConfig`]): settings of the run; `critic_updates_per_step` counts the first update too.
        batches (`list[RolloutBatch]`): this process's micro-batches of the optimizer step.
        loss_of (`Callable`): a micro-batch to its share of the loss, 0-dimensional.
        guard ([`StepGuard`]): tells whether an update must be dropped; then there are no more.
    """
    updates = args.critic_updates_per_step
    for update in range(2, updates + 1):
        numbers = []
        for index, batch in enumerate(batches):
            with critic.accumulate(is_last=index == len(batches) - 1):
                loss = loss_of(batch)
                critic.backward(guard.for_backward(loss))
            numbers.append(loss.detach())
        numbers.append(critic.clip_gradient())
        drop = guard.must_drop(numbers)
        critic.step(drop, advance=False)
        if drop:
            logger.warning(
                "The critic's updates %d to %d of this step are left out: a loss or gradient is not finite.",
                update,
                updates,
            )
            return
