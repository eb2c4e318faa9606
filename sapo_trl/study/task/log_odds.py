"""How sure a policy is of the right decisions, measured without sampling: on the right path, token by token."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .config import TaskConfig
from .problems import Problem
from .solutions import write_solution
from .steps import read_steps
from .vocabulary import CELLS
from .warm_start import encode_solutions


@dataclass(frozen=True)
class LogOdds:
    """
    A policy's choices at the places where the outcome is decided.

    Args:
        decisions (`torch.Tensor`):
            float64 `(N, gates)`, log-odds of the right cell among the four cells. A policy that has lost the form of
            responses may still know the cells: these numbers show knowledge alone.
        readings (`torch.Tensor`): float64 `(N, gates)`, log-odds of the right number among the nine numbers.
        chances (`torch.Tensor`):
            float64 `(N, gates, 2)`, probabilities of the right cell, and of the right number after it, among all
            tokens.
    """

    decisions: torch.Tensor
    readings: torch.Tensor
    chances: torch.Tensor


@torch.no_grad()
def log_odds(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    config: TaskConfig,
    problems: Sequence[Problem],
    *,
    batch_size: int = 128,
    seed: int = 0,
) -> LogOdds:
    """
    Measure a policy on the right solutions of problems.

    At each gate the policy has read the right solution so far, with free words drawn evenly. Nothing is sampled from
    the policy, so the measurement has no sampling noise, and a run that lost its form is measured like any other.

    Args:
        model ([`~transformers.PreTrainedModel`]): the policy.
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]): its processor.
        config ([`TaskConfig`]): the task.
        problems (`Sequence[Problem]`): the problems.
        batch_size (`int`, *optional*, defaults to `128`): problems in a forward.
        seed (`int`, *optional*, defaults to `0`): of the free words, and of the numbers' places in the pictures.

    Returns:
        [`LogOdds`]. Raises `ValueError` without a problem.
    """
    if not problems:
        raise ValueError("`problems` is empty: give at least one.")
    tokenizer = getattr(processor, "tokenizer", processor)
    cells = _ids(tokenizer, [f" {cell}" for cell in CELLS])
    digits = _ids(tokenizer, [str(number) for number in range(1, 10)])
    was_training, rng = model.training, random.Random(f"log-odds {seed}")
    model.eval()
    found = []
    for start in range(0, len(problems), batch_size):
        part = list(problems[start : start + batch_size])
        solutions = [write_solution(config, p, p.right_cells, rng=rng) for p in part]
        batch = encode_solutions(processor, config, part, solutions, rng=rng)
        labels = batch.pop("labels")
        logits = model(**{name: x.to(model.device) for name, x in batch.items()}, use_cache=False).logits
        # The logits before a token choose it.
        rows, columns = torch.isin(labels, cells).nonzero(as_tuple=True)
        here = [logits[rows, columns + offset - 1].double().cpu() for offset in (0, 1)]
        chosen = [labels[rows, columns + offset] for offset in (0, 1)]
        chances = [x.softmax(-1).gather(-1, y[:, None])[:, 0] for x, y in zip(here, chosen, strict=True)]
        pieces = [_log_odds(x[:, ids], y, ids) for x, y, ids in zip(here, chosen, (cells, digits), strict=True)]
        found.append(torch.stack([*pieces, *chances], -1).reshape(len(part), config.gates, 4))
    model.train(was_training)
    decisions, readings, *chances = torch.cat(found).unbind(-1)
    return LogOdds(decisions, readings, torch.stack(chances, -1))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    return torch.tensor([tokenizer(text)["input_ids"][0] for text in texts])


def _log_odds(logits: torch.Tensor, chosen: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    is_right = ids == chosen[:, None]
    right = logits.masked_fill(~is_right, -torch.inf).logsumexp(-1)
    return right - logits.masked_fill(is_right, -torch.inf).logsumexp(-1)


def exact_values(
    problems: Sequence[Problem], responses: Sequence[Sequence[str]], chances: torch.Tensor
) -> list[list[float]]:
    """
    The value of the state before each token of some responses, and after the last one, under a policy that decides
    each gate on its own.

    On a right path the value is the product of the remaining gates' chances of a right decision and a right reading.
    After a mistake it is 0. Free words and remarks do not change it. From a line of another form on it stays as it
    was, and after the last token it is the reward.

    Args:
        problems (`Sequence[Problem]`): the problems.
        responses (`Sequence[Sequence[str]]`): the texts of each response's tokens.
        chances (`torch.Tensor`): float `(N, gates, 2)`, from [`LogOdds`], of the same problems.

    Returns:
        `list[list[float]]`: one value more than the response has tokens.
    """
    values = []
    for problem, tokens, of_gates in zip(problems, responses, chances.tolist(), strict=True):
        # Without the special tokens at the end, which have no character of the response.
        solution = read_steps(problem, "".join(tokens))
        steps = solution.steps
        ahead = [1.0]
        for cell, number in reversed(of_gates):
            ahead.insert(0, ahead[0] * cell * number)
        row, position, done, alive = [ahead[0]], 0, 0, 1.0
        for token in tokens:
            position += len(token)
            # A number follows its cell directly, and a step is done with its number.
            while done < len(steps) and steps[done].decision + 2 <= position:
                alive *= steps[done].right and steps[done].read
                done += 1
            is_chosen = done < len(steps) and steps[done].decision + 1 == position
            if is_chosen:  # only its number is still to be read
                row.append(alive * steps[done].right * of_gates[done][1] * ahead[done + 1])
            else:
                row.append(alive * ahead[done])
        row[-1] = float(solution.correct)
        values.append(row)
    return values
