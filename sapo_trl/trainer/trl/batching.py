"""Which rows of a rollout share a micro-batch."""

from __future__ import annotations

import itertools

import torch

from ...config import TRL_LOSS_TYPES, SAPOConfig
from ...distributed import Processes, gradients_are_in_pieces
from ...rollouts.types import RolloutBatch
from ..padding import common_cuts, cut_rows, equal_groups, group_rows, merge_rows, take_rows


def may_exchange_rows(args: SAPOConfig, has_aux_loss: bool) -> bool:
    """
    Whether the micro-batches of an optimizer step may exchange rows without a change of its gradient.

    Args:
        args ([`SAPOConfig`]): settings of the run.
        has_aux_loss (`bool`): whether the load-balancing loss of a mixture of experts is trained on.
    """
    if args.loss_type not in TRL_LOSS_TYPES:
        return True
    # TRL takes the mean of these losses, or a quantile, over the tokens of a micro-batch.
    return not (
        args.loss_type == "bnpo"
        or args.entropy_coef != 0.0
        or args.use_adaptive_entropy
        or args.top_entropy_quantile < 1.0
        or has_aux_loss
    )


def by_length(batches: list[RolloutBatch], args: SAPOConfig, processes: Processes) -> list[RolloutBatch]:
    """
    Exchange rows within each optimizer step, so that rows of similar length share a micro-batch.

    Args:
        batches (`list[RolloutBatch]`): the micro-batches of a rollout.
        args ([`SAPOConfig`]): settings of the run.
        processes ([`~sapo_trl.distributed.Processes`]): of the run.

    Returns:
        `list[RolloutBatch]`: as many, each with its `token_counts`.
    """
    regrouped, window = [], args.gradient_accumulation_steps
    lengths = torch.stack([batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1) for batch in batches])
    lengths = lengths.view(len(batches) // window, -1).tolist()
    columns = batches[0]["prompt_mask"].size(1) + batches[0]["completion_mask"].size(1)
    for step, groups in enumerate(_groups(lengths, columns, args, processes)):
        rows = merge_rows(batches[step * window : (step + 1) * window])
        # With their lengths, so that nothing asks the device for them again.
        rows["token_counts"] = lengths[step]
        regrouped += [take_rows(rows, group) for group in groups]
    return regrouped


def _groups(lengths: list[list[int]], columns: int, args: SAPOConfig, processes: Processes) -> list[list[list[int]]]:
    """
    Args:
        lengths (`list[list[int]]`): for each optimizer step of a rollout the tokens of this process's rows.
        columns (`int`): of the rollout, padding included.
        args ([`SAPOConfig`]): settings of the run.
        processes ([`~sapo_trl.distributed.Processes`]): of the run.

    Returns:
        `list[list[list[int]]]`: for each optimizer step the rows of each micro-batch.
    """
    num_groups, batch_size = args.gradient_accumulation_steps, args.per_device_train_batch_size
    if args.loss_type in TRL_LOSS_TYPES:  # which weigh each micro-batch alike
        return [equal_groups(step, num_groups) for step in lengths]
    if not gradients_are_in_pieces(processes.accelerator):
        return [group_rows(step, num_groups, batch_size * columns) for step in lengths]
    # In each micro-batch, at its backward if not before, all processes wait for the process with the most tokens.
    # They exchange lengths once a rollout, which they begin to train on together.
    own = torch.tensor([[columns, *itertools.chain(*lengths)]], device=processes.accelerator.device)
    everyone = processes.gather(own).cpu().numpy()
    max_tokens = batch_size * int(everyone[:, 0].max())
    steps = everyone[:, 1:].reshape(len(everyone), len(lengths), -1)
    cuts = [common_cuts(steps[:, index], num_groups, max_tokens) for index in range(len(lengths))]
    return [cut_rows(step, at) for step, at in zip(lengths, cuts, strict=True)]
