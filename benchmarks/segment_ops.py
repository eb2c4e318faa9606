"""
Time the segment operations of one rollout: segmentation, GAE, whitening, policy loss and value loss with gradients.

The comparison is the same algorithm in its usual form: Python loops over responses and segments, and each consumer
computes the partition again. Before the timing, both are checked to give the same numbers.

    python benchmarks/segment_ops.py                 # 512 responses of up to 2,048 tokens
    python benchmarks/segment_ops.py --rows 32 --length 256 --repeats 3
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from sapo_trl.advantages import masked_whiten, segment_gae
from sapo_trl.losses import clipped_policy_loss, segment_value_loss
from sapo_trl.segmentation import entropy_segments


TOP_PERCENT, GAMMA, LAM, CLIP_LOW, CLIP_HIGH, DUAL_CLIP, CLIPRANGE_VALUE = 30.0, 1.0, 0.99, 0.2, 0.28, 3.0, 0.5


def make_rollout(rows: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Random rollout. Lengths are log-normal around a third of the maximum, like lengths of reasoning responses."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(rows, generator=generator).mul(0.6).exp() * length / 3).long().clamp(1, length)
    lengths[0] = length

    def normal() -> torch.Tensor:
        return torch.randn(rows, length, generator=generator).to(device)

    old_logps = -normal().abs()
    mask = (torch.arange(length) < lengths.unsqueeze(1)).to(device)
    rewards = torch.zeros(rows, length, device=device)
    rewards[torch.arange(rows), lengths - 1] = torch.rand(rows, generator=generator).to(device)
    return {
        "entropies": normal().abs(),
        "mask": mask,
        "rewards": rewards,
        "values": normal(),
        "old_logps": old_logps,
        "logps": old_logps + 0.1 * normal(),
        "value_preds": normal(),
    }


def vectorised(rollout: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """This package's functions. Returns both losses and both gradients."""
    segments = entropy_segments(rollout["entropies"], rollout["mask"], TOP_PERCENT)
    advantages, returns = segment_gae(rollout["rewards"], rollout["values"], segments, GAMMA, LAM, "end")
    advantages = masked_whiten(advantages, rollout["mask"]).clamp(-5, 5)
    logps = rollout["logps"].clone().requires_grad_()
    value_preds = rollout["value_preds"].clone().requires_grad_()
    policy = clipped_policy_loss(
        logps, rollout["old_logps"], advantages, rollout["mask"], segments, CLIP_LOW, CLIP_HIGH, DUAL_CLIP
    )
    value = segment_value_loss(value_preds, rollout["values"], returns, segments, "end", CLIPRANGE_VALUE)
    (policy.loss + value.loss).backward()
    return policy.loss.detach(), value.loss.detach(), logps.grad, value_preds.grad


def loop_ends(entropies: torch.Tensor, length: int) -> list[int]:
    """Positions of the last tokens of one response's segments."""
    count = max(math.ceil(length * TOP_PERCENT / 100), 1)
    order = torch.sort(entropies[:length], descending=True, stable=True).indices
    ends = sorted(order[:count].tolist())
    return ends if ends[-1] == length - 1 else [*ends, length - 1]


def loops(rollout: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same, response by response and segment by segment."""
    lengths = rollout["mask"].sum(1).tolist()
    advantages, returns = torch.zeros_like(rollout["values"]), torch.zeros_like(rollout["values"])
    for row, length in enumerate(lengths):
        ends = loop_ends(rollout["entropies"][row], length)
        tail = next_value = 0.0
        for index in reversed(range(len(ends))):
            begin, end = ends[index - 1] + 1 if index else 0, ends[index]
            value = rollout["values"][row, end]
            reward = rollout["rewards"][row, begin : end + 1].sum()
            tail = reward + GAMMA * next_value - value + GAMMA * LAM * tail
            next_value = value
            advantages[row, begin : end + 1] = tail
            returns[row, begin : end + 1] = tail + value
    mask = rollout["mask"]
    kept = advantages[mask]
    advantages = ((advantages - kept.mean()) * torch.rsqrt(kept.var() + 1e-8)).clamp(-5, 5)

    logps = rollout["logps"].clone().requires_grad_()
    log_ratio = (logps - rollout["old_logps"]).clamp(-20, 20)
    # Rows and segments are split off and joined again. If the loop wrote into slices, autograd would copy the whole
    # tensor once per segment, and the comparison would be unfair.
    rows = []
    for row, (length, row_log_ratio) in enumerate(zip(lengths, log_ratio.unbind(0), strict=True)):
        ends = loop_ends(rollout["entropies"][row], length)
        sizes = [end - before for end, before in zip(ends, [-1, *ends], strict=False)]
        pieces = [piece.mean().expand(piece.size(0)) for piece in row_log_ratio[:length].split(sizes)]
        rows.append(torch.cat([*pieces, row_log_ratio.new_zeros(row_log_ratio.size(0) - length)]))
    segment_log_ratio = torch.stack(rows)
    ratio = segment_log_ratio.exp()
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages)
    loss = torch.where(advantages < 0, torch.minimum(loss, -DUAL_CLIP * advantages), loss)
    policy_loss = loss[mask].mean()

    value_preds = rollout["value_preds"].clone().requires_grad_()
    is_end = torch.zeros_like(mask)
    for row, length in enumerate(lengths):
        for end in loop_ends(rollout["entropies"][row], length):
            is_end[row, end] = True
    near_old = torch.clamp(value_preds, rollout["values"] - CLIPRANGE_VALUE, rollout["values"] + CLIPRANGE_VALUE)
    error = torch.maximum((value_preds - returns).square(), (near_old - returns).square())
    value_loss = 0.5 * error[is_end].mean()
    (policy_loss + value_loss).backward()
    return policy_loss.detach(), value_loss.detach(), logps.grad, value_preds.grad


def timed(function, rollout: dict[str, torch.Tensor], repeats: int) -> list[float]:
    """Seconds of each run, after a first run that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function(rollout)
        if rollout["mask"].is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of the vectorised operations")
    parser.add_argument("--loop-repeats", type=int, default=1, help="counted runs of the loops")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    rollout = make_rollout(args.rows, args.length, args.device)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in make_rollout(4, 64, args.device).items()}
    for found, expected in zip(vectorised(exact), loops(exact), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

    fast = timed(vectorised, rollout, args.repeats)
    slow = timed(loops, rollout, args.loop_repeats)
    tokens = int(rollout["mask"].sum())
    table = Table(
        title=f"{args.rows} × {args.length} ({tokens:,} tokens), {args.device}, {torch.get_num_threads()} threads"
    )
    for heading in ("", "min s", "median s", "max s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, seconds in (("sapo_trl", fast), ("loops", slow)):
        table.add_row(name, f"{min(seconds):.4f}", f"{statistics.median(seconds):.4f}", f"{max(seconds):.4f}")
    speedup = statistics.median(slow) / statistics.median(fast)
    console = Console()
    console.print(table)
    console.print(f"{speedup:.0f} times as fast (medians)")
    return speedup


if __name__ == "__main__":
    main()
