"""
SRPO, Structured Role-aware policy optimization (arXiv 2605.07274): a weight for each token of an image-grounded
response, by the token's role in it. Pure functions on tensors, combined in [`RoleAwareWeighting`].

A response first describes the image (perception), then reasons. The weight of a perception token rises with the
dependence of its log-probability on the image. The weight of a reasoning token rises with the dependence of its
log-probability on the preceding description. The weights are positive and average one, so they redistribute a
response's advantage over its tokens and never change its sign.

Only the abstract and the introduction of the paper are public; no code was found, and its formulas could not be read.
The abstract names the two roles, the two contrasts under one policy, the shared
baseline and the positive weights; every formula and default in this module is proposed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from .image_corruption import patches_per_row
from .segmentation import token_texts
from .segments import accumulation_dtype


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PERCEPTION_PATTERN = r"<perception>(.*?)</perception>"
"""A regular expression whose group 1 is the perception span. Proposed here."""

REASONING_PATTERN = r"<think>(.*?)</think>"
"""A regular expression whose group 1 is the reasoning span. Proposed here."""


def role_spans(
    completion_ids: torch.Tensor,
    mask: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    perception_pattern: str = PERCEPTION_PATTERN,
    reasoning_pattern: str = REASONING_PATTERN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Find the tokens of the perception span and of the reasoning span of each response. Proposed here.

    The patterns are searched, with `re.DOTALL`, in the joined texts of the row's masked tokens. The span is group 1 of
    the match, or the whole match of a pattern without groups; a token belongs to it if the token's first character
    does. A row is malformed, and has neither span, unless each pattern matches exactly once, each span has a token and
    the spans share no character.

    Finding text in token sequences works row by row on strings, once per rollout.

    Args:
        completion_ids (`torch.Tensor`): int64 tensor of shape `(B, T)`.
        mask (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens to search; holes are allowed.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer of the completions.
        perception_pattern (`str`, *optional*, defaults to `PERCEPTION_PATTERN`): regular expression.
        reasoning_pattern (`str`, *optional*, defaults to `REASONING_PATTERN`): regular expression.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`:
            two disjoint bool tensors of shape `(B, T)`, the perception tokens and the reasoning tokens. A row has
            tokens in both or in neither.

    Raises:
        ValueError: if a pattern is not a regular expression, or the shapes differ.
    """
    _check_shapes(completion_ids=completion_ids, mask=mask)
    patterns = (
        _compiled("perception_pattern", perception_pattern),
        _compiled("reasoning_pattern", reasoning_pattern),
    )
    texts = token_texts(tokenizer, completion_ids)
    # Filled on the CPU and moved once: writing row by row on the device would be one transfer per row.
    roles = torch.zeros(2, *mask.shape, dtype=torch.bool)
    for row, (ids, keep) in enumerate(zip(completion_ids.tolist(), mask.bool().tolist(), strict=True)):
        positions = [position for position, kept in enumerate(keep) if kept]
        pieces = [texts[ids[position]] for position in positions]
        spans = [_only_span(pattern, "".join(pieces)) for pattern in patterns]
        if None in spans or max(start for start, _ in spans) < min(end for _, end in spans):
            continue
        lengths = torch.tensor([len(piece) for piece in pieces])
        starts = torch.tensor([0, *accumulate(len(piece) for piece in pieces)][:-1])
        # A token without text has no first character, so it belongs to no span.
        found = torch.stack([(starts >= start) & (starts < end) & (lengths > 0) for start, end in spans])
        if found.any(dim=1).all():
            roles[:, row, positions] = found
    perception, reasoning = roles.to(mask.device)
    return perception, reasoning


def remove_span(
    ids: torch.Tensor, mask: torch.Tensor, span: torch.Tensor, pad_id: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Drop tokens from right-padded completions.

    The tokens of the mask that are outside the span move to the left, in order. The length stays `T`, so other tensors
    of a batch that have the completions' length still fit.

    Args:
        ids (`torch.Tensor`): int64 tensor of shape `(B, T)`.
        mask (`torch.Tensor`): bool or int64 tensor of shape `(B, T)`, the tokens that are not padding.
        span (`torch.Tensor`): bool tensor of shape `(B, T)`, the tokens to drop.
        pad_id (`int`, *optional*, defaults to `0`): token that fills the rest of a row.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`:
            the new ids and the new mask, of the shapes and dtypes of the old ones, and `source`, an int64 tensor of
            shape `(B, T)`: the new position of each kept token. `x.gather(1, source)` reads per-token results of the
            shortened rows back at the original positions. Dropped tokens and padding read position 0, which has no
            meaning there.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(ids=ids, mask=mask, span=span)
    kept = mask.bool() & ~span.bool()
    target = torch.cumsum(kept, dim=1) - 1
    # Dropped tokens are written to one extra column, which is then cut off.
    length = ids.size(1)
    padded = torch.full((ids.size(0), length + 1), pad_id, dtype=ids.dtype, device=ids.device)
    new_ids = padded.scatter(1, target.masked_fill(~kept, length), ids)[:, :-1]
    new_mask = torch.arange(length, device=mask.device) < kept.sum(dim=1, keepdim=True)
    return new_ids, new_mask.to(mask.dtype), target.masked_fill(~kept, 0)


@torch.no_grad()
def image_contrast(logps: torch.Tensor, logps_corrupted: torch.Tensor) -> torch.Tensor:
    """
    Score of the perception tokens: how much the image raises a token's log-probability. Proposed here.

    Args:
        logps (`torch.Tensor`): float tensor of shape `(B, T)`, log-probabilities given the image.
        logps_corrupted (`torch.Tensor`): the same under the same policy given the corrupted image.

    Returns:
        `torch.Tensor`: `logps - logps_corrupted`, `(B, T)`, float32 or wider, without gradient.
    """
    dtype = accumulation_dtype(logps, logps_corrupted)
    return logps.to(dtype) - logps_corrupted.to(dtype)


@torch.no_grad()
def perception_consistency(logps: torch.Tensor, logps_without_perception: torch.Tensor) -> torch.Tensor:
    """
    Score of the reasoning tokens: how much the perception span raises a token's log-probability. Proposed here.

    Args:
        logps (`torch.Tensor`): float tensor of shape `(B, T)`, log-probabilities given the whole response so far.
        logps_without_perception (`torch.Tensor`):
            the same under the same policy given the response without its perception span, at the original positions.

    Returns:
        `torch.Tensor`: `logps - logps_without_perception`, `(B, T)`, float32 or wider, without gradient.
    """
    dtype = accumulation_dtype(logps, logps_without_perception)
    return logps.to(dtype) - logps_without_perception.to(dtype)


@torch.no_grad()
def role_aware_weights(
    perception_scores: torch.Tensor,
    reasoning_scores: torch.Tensor,
    perception: torch.Tensor,
    reasoning: torch.Tensor,
    temperature: float = 1.0,
    clip: float = 1.0,
    eps: float = 1e-6,
) -> torch.Tensor:
    """
    Turn the scores of the two roles into token weights. Proposed here.

    With `s_t` the score of a token in its role, `z_t = s_t / (std + eps)` with the population standard deviation of
    the scores of that role in that row. Both roles share the baseline `b`, the mean of `z` over the row's tokens of
    either role, and the weight is `exp(clamp((z_t - b) / temperature, -clip, clip))`, rescaled to a mean of 1 over
    these tokens. So within a row no weight is more than `exp(2 * clip)` times another.

    A role whose scores do not vary (`std` at most `eps * max(1, rms)`, with the root mean square of its scores) is set
    to `z_t = b`: its tokens neither move the baseline nor are moved by it. Such scores cannot compare the role's
    tokens. Dividing by that `std` would let rounding errors, or a span of a single token, decide the baseline. So
    scores that are all 0, or contrasts that make no difference, give a weight of exactly 1.

    The common baseline lets weight pass from one role to the other; [`role_means`] shows how much.

    Args:
        perception_scores (`torch.Tensor`): float tensor of shape `(B, T)`, read at the perception tokens only.
        reasoning_scores (`torch.Tensor`): float tensor of shape `(B, T)`, read at the reasoning tokens only.
        perception (`torch.Tensor`): bool tensor of shape `(B, T)`, see [`role_spans`].
        reasoning (`torch.Tensor`): bool tensor of shape `(B, T)`, disjoint from `perception`.
        temperature (`float`, *optional*, defaults to `1.0`): larger is closer to equal weights; above 0.
        clip (`float`, *optional*, defaults to `1.0`):
            bound on the exponent, above 0. Beyond 40 or so the smallest weights underflow to 0 in float32.
        eps (`float`, *optional*, defaults to `1e-6`): added to the standard deviation.

    Returns:
        `torch.Tensor`:
            `(B, T)`, float32 or wider, positive, without gradient. Tokens without a role have weight 1, so do whole
            rows without spans. Scores outside their role may be anything, NaN included.

    Raises:
        ValueError: if the shapes differ, the roles overlap, or `temperature` or `clip` is out of range.
    """
    _check_positive("temperature", temperature)
    _check_positive("clip", clip)
    _check_shapes(
        perception_scores=perception_scores,
        reasoning_scores=reasoning_scores,
        perception=perception,
        reasoning=reasoning,
    )
    perception, reasoning = perception.bool(), reasoning.bool()
    if (perception & reasoning).any():
        raise ValueError("`perception` and `reasoning` must be disjoint: a token has one role at most.")
    spans = perception | reasoning
    dtype = accumulation_dtype(perception_scores, reasoning_scores)
    if not spans.numel():
        return torch.ones(spans.shape, dtype=dtype, device=spans.device)
    z = torch.zeros(perception.shape, dtype=dtype, device=perception.device)
    varies = torch.zeros_like(perception)
    for scores, role in ((perception_scores, perception), (reasoning_scores, reasoning)):
        scores = torch.where(role, scores.to(dtype), 0)
        count = role.sum(dim=1, keepdim=True).clamp(min=1)
        mean = scores.sum(dim=1, keepdim=True) / count
        std = (torch.where(role, scores - mean, 0).square().sum(dim=1, keepdim=True) / count).sqrt()
        rms = (scores.square().sum(dim=1, keepdim=True) / count).sqrt()
        role_varies = role & (std > eps * rms.clamp(min=1))
        z = torch.where(role_varies, scores / (std + eps), z)
        varies = varies | role_varies
    baseline = z.sum(dim=1, keepdim=True) / varies.sum(dim=1, keepdim=True).clamp(min=1)
    exponents = torch.where(varies, ((z - baseline) / temperature).clamp(-clip, clip), 0)
    # Dividing by the largest factor keeps the exponential finite for any `clip`; the rescaling undoes the division.
    factors = torch.where(spans, torch.exp(exponents - exponents.amax(dim=1, keepdim=True)), 0)
    mean = factors.sum(dim=1, keepdim=True) / spans.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(spans, factors / mean, 1)


@torch.no_grad()
def role_means(
    weights: torch.Tensor, perception: torch.Tensor, reasoning: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Metrics of the weights, as sums and counts, so that means over processes and steps come out right.

    Args:
        weights (`torch.Tensor`): float tensor of shape `(B, T)`, see [`role_aware_weights`].
        perception (`torch.Tensor`): bool tensor of shape `(B, T)`.
        reasoning (`torch.Tensor`): bool tensor of shape `(B, T)`.

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`:
            0-dimensional sums and counts. `role/perception_weight` and `role/reasoning_weight`: the weights of each
            role's tokens; `role/well_formed`: the rows with spans among all rows.
    """
    rows = torch.tensor(weights.size(0), device=weights.device)
    well_formed = (perception.bool() | reasoning.bool()).any(dim=1).sum()
    return {
        "role/perception_weight": _sum_and_count(weights, perception),
        "role/reasoning_weight": _sum_and_count(weights, reasoning),
        "role/well_formed": (well_formed.to(accumulation_dtype(weights)), rows),
    }


@dataclass(frozen=True)
class RoleAwareWeighting:
    """
    The token weights of a rollout, from two extra forward passes of its policy and no extra rollout.

    One pass sees corrupted images, the other the completions without their perception span. Fields that are functions
    can be replaced by functions of the same signature.

    Args:
        perception_pattern (`str`, *optional*, defaults to `PERCEPTION_PATTERN`): see [`role_spans`].
        reasoning_pattern (`str`, *optional*, defaults to `REASONING_PATTERN`): see [`role_spans`].
        temperature (`float`, *optional*, defaults to `1.0`): above 0, see [`role_aware_weights`].
        clip (`float`, *optional*, defaults to `1.0`): above 0, see [`role_aware_weights`].
        perception_score (`Callable`, *optional*, defaults to [`image_contrast`]):
            `(logps, logps_corrupted)` to the scores of the perception tokens.
        reasoning_score (`Callable`, *optional*, defaults to [`perception_consistency`]):
            `(logps, logps_without_perception)` to the scores of the reasoning tokens.
        weigh (`Callable`, *optional*, defaults to [`role_aware_weights`]):
            `(perception_scores, reasoning_scores, perception, reasoning, temperature, clip)` to the weights.

    Raises:
        ValueError: if a pattern is not a regular expression or a number is out of range.
    """

    perception_pattern: str = PERCEPTION_PATTERN
    reasoning_pattern: str = REASONING_PATTERN
    temperature: float = 1.0
    clip: float = 1.0
    perception_score: Callable[..., torch.Tensor] = image_contrast
    reasoning_score: Callable[..., torch.Tensor] = perception_consistency
    weigh: Callable[..., torch.Tensor] = role_aware_weights

    def __post_init__(self):
        _compiled("perception_pattern", self.perception_pattern)
        _compiled("reasoning_pattern", self.reasoning_pattern)
        _check_positive("temperature", self.temperature)
        _check_positive("clip", self.clip)

    @torch.no_grad()
    def __call__(
        self,
        *,
        batch: dict[str, Any],
        completion_ids: torch.Tensor,
        mask: torch.Tensor,
        logps: torch.Tensor,
        tokenizer: PreTrainedTokenizerBase,
        logps_corrupted: Callable[[], torch.Tensor],
        forward: Callable[[dict[str, Any]], torch.Tensor],
        pad_id: int,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """
        Weigh the tokens of a batch.

        A row without an image is treated as malformed. When no row is well formed, neither function is called.

        Args:
            batch (`dict[str, Any]`):
                input of `forward`, not modified. `completion_mask` `(B, T)`, `image_grid_thw` `(images, 3)` and
                `num_images` (the images of each row) are read here. The prompt is
                not touched. Neither is `mm_token_type_ids`, which is 0 on completions of any length.
            completion_ids (`torch.Tensor`): int64 tensor of shape `(B, T)`, right-padded.
            mask (`torch.Tensor`):
                bool tensor of shape `(B, T)`, the tokens that can have a role. Unlike `batch["completion_mask"]`, it
                may leave out tokens that the policy reads but did not write, such as tool outputs.
            logps (`torch.Tensor`):
                float tensor of shape `(B, T)`, the result of `forward` for the unchanged batch. Values from an
                inference engine or at another temperature would add their difference to every score.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer of the completions.
            logps_corrupted (`Callable`): returns the `(B, T)` log-probabilities of the batch with corrupted images.
            forward (`Callable`): returns the `(B, T)` log-probabilities of a batch's completions.
            pad_id (`int`): the padding token.
            reduce (`Callable`, *optional*):
                sums a tensor over all processes. With it, both functions are called on all processes or on none, as
                sharded parameters require. Without it each process decides for itself.

        Returns:
            `tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]`:
                the weights, see [`role_aware_weights`], and the metrics of [`role_means`] together with
                `role/visual_dependency` and `role/perception_consistency`, the scores of each role's tokens.

        Raises:
            ValueError: if the number of images does not fit, or their layout is not Qwen's.
        """
        _check_shapes(completion_ids=completion_ids, mask=mask, logps=logps)
        perception, reasoning = role_spans(
            completion_ids, mask, tokenizer, self.perception_pattern, self.reasoning_pattern
        )
        has_image = (patches_per_row(batch, len(mask)) > 0).to(mask.device).unsqueeze(1)
        perception, reasoning = perception & has_image, reasoning & has_image

        num_tokens = perception.sum()
        if (num_tokens if reduce is None else reduce(num_tokens)) > 0:
            perception_scores = self.perception_score(logps, logps_corrupted())
            ids, completion_mask, source = remove_span(completion_ids, batch["completion_mask"], perception, pad_id)
            shortened = forward({**batch, "completion_ids": ids, "completion_mask": completion_mask})
            reasoning_scores = self.reasoning_score(logps, shortened.gather(1, source))
            weights = self.weigh(
                perception_scores, reasoning_scores, perception, reasoning, self.temperature, self.clip
            )
        else:
            perception_scores = reasoning_scores = torch.zeros_like(logps, dtype=accumulation_dtype(logps))
            weights = torch.ones_like(perception_scores)
        metrics = role_means(weights, perception, reasoning)
        metrics["role/visual_dependency"] = _sum_and_count(perception_scores, perception)
        metrics["role/perception_consistency"] = _sum_and_count(reasoning_scores, reasoning)
        return weights, metrics


def _only_span(pattern: re.Pattern, text: str) -> tuple[int, int] | None:
    """Start and end of the only match's group 1 (without groups: of the match); `None` unless exactly one matches."""
    matches = list(pattern.finditer(text))
    if len(matches) != 1:
        return None
    # An optional group that took no part in the match is at (-1, -1), which has no token.
    return matches[0].span(1 if pattern.groups else 0)


def _sum_and_count(x: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    where = where.bool()
    return torch.where(where, x.to(accumulation_dtype(x)), 0).sum(), where.sum()


def _compiled(name: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"`{name}` is not a regular expression: {pattern!r} ({error}).") from error


def _check_positive(name: str, value: float) -> None:
    if not 0.0 < value < float("inf"):
        raise ValueError(f"`{name}` must be a finite number above 0, got {value}.")


def _check_shapes(**tensors: torch.Tensor) -> None:
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        found = ", ".join(f"`{name}` {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"All must have the same shape (batch, length), got {found}.")
