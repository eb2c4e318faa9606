"""
Operations of each critic against TRL's GRPO, by the depth of the policy and by the length of responses.

The policy has the width of a published model. It is too large for a trainer here, so fake tensors are counted, which
have no storage: forwards and backward over one row, to score it and to train on it. Gradient checkpointing is on. The
row has no picture, because not every critic runs the vision tower. No padding is counted.

    python benchmarks/operations_scaling.py --out results        # on a CPU

It writes `operations_scaling.json` and, as tables for `docs/performance.md`, `operations_scaling.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from memory_and_speed import LORA_RANK, LORA_TARGETS
from operations import OperationCounter
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForImageTextToText, PreTrainedModel

from sapo_trl.critic.value_head import SegmentValueHead, backbone_of, hidden_size_of
from sapo_trl.planner.shapes import model_config


MODELS = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")
LAYERS, LENGTHS, USUAL_LENGTH = (4, 8, 16, 32), (64, 256, 1024, 2048), 1024

Ratios = dict[str, float]
"""Operations with each critic, relative to TRL's GRPO without one."""


def build_policy(name: str, lora: bool, layers: int | None) -> PreTrainedModel:
    """A published model with fake tensors, as it is trained; with its own number of layers, or another."""
    config = model_config(name)
    if layers is not None:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:1] * layers
    with torch.device("meta"):
        policy = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        if lora:
            policy = get_peft_model(policy, LoraConfig(r=LORA_RANK, target_modules=LORA_TARGETS))
    # From the meta device, which autocast does not know, to fake tensors of a CPU. `Module.to` cannot do that.
    for module in policy.modules():
        for name, x in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty_like(x, device="cpu"), requires_grad=x.requires_grad))
        for name, x in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(x, device="cpu"))
    if lora:
        policy.enable_input_require_grads()
    policy.gradient_checkpointing_enable()
    return policy.train()


def backbone_operations(policy: PreTrainedModel, length: int) -> int:
    """To score a row and to train on it, without LM head."""
    ids = torch.zeros(1, length, dtype=torch.long)

    def forward() -> torch.Tensor:
        # Without a mask the attention is causal.
        return backbone_of(policy)(
            input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False
        ).last_hidden_state

    with OperationCounter() as counter:
        with torch.no_grad():
            forward()
        forward().sum().backward()
    return counter.total


def lm_head_operations(policy: PreTrainedModel, response: int) -> int:
    """
    TRL's LM head sees the responses alone, as on a GPU: to score, to train, once more for the logits' gradient, and
    for the gradients of the hidden states and of its own weight.
    """
    weight = policy.get_output_embeddings().weight
    return (5 if weight.requires_grad else 4) * 2 * response * weight.numel()


def reading_operations(critic: SegmentValueHead, hidden_size: int, length: int) -> int:
    """Of a critic that reads the policy's hidden states, for the same row."""
    states = torch.zeros(1, length, hidden_size, dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        taken = [critic.take(index, states) for index in range(critic.reads)]
        return critic.values_of(taken, torch.ones(1, length, dtype=torch.long))

    with OperationCounter() as counter:
        with torch.no_grad():
            forward()
        forward().sum().backward()
    return counter.total


def ratios(name: str, layers: int | None, prompt: int, lengths: tuple[int, ...]) -> list[Ratios]:
    """For each length of the response: a ladder, a shared head, and a critic like the policy; all weights and LoRA."""
    found: list[Ratios] = [{} for _ in lengths]
    for lora, suffix, own in ((False, "", "separate"), (True, ", LoRA", "adapter")):
        with FakeTensorMode():
            policy = build_policy(name, lora, layers)
            hidden_size = hidden_size_of(backbone_of(policy))
            ladder, shared = (SegmentValueHead.from_policy(policy, mode=mode).train() for mode in ("ladder", "shared"))
            ladder.ladder.checkpoints = True
            for row, response in zip(found, lengths, strict=True):
                backbone = backbone_operations(policy, prompt + response)
                trl = backbone + lm_head_operations(policy, response)
                row[f"ladder{suffix}"] = 1 + reading_operations(ladder, hidden_size, prompt + response) / trl
                row[f"shared{suffix}"] = 1 + reading_operations(shared, hidden_size, prompt + response) / trl
                row[f"{own}{suffix}"] = 1 + backbone / trl  # its value head is a millionth of that
    print(f"{name}, {layers or 'all'} layers: {found}", file=sys.stderr, flush=True)
    return found


def table(title: str, columns: list[str], found: list[Ratios]) -> list[str]:
    lines = [f"| {title} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    lines += [f"| {critic} | {' | '.join(f'{row[critic]:.4f}' for row in found)} |" for critic in found[0]]
    return [*lines, ""]


def as_markdown(report: dict[str, Any]) -> str:
    """A table for depths, and one for lengths at each model's own depth."""
    options = report["options"]
    lines = table("Critic", [f"{number} layers" for number in options["layers"]], report["depth"])
    lines += [f"{MODELS[0]}'s width, responses of {USUAL_LENGTH} tokens.", ""]
    for name, found in report["length"].items():
        lines += table(f"Critic, {name}", [f"{number} tokens" for number in options["lengths"]], found)
    lines += [f"Operations relative to TRL GRPO's, for prompts of {options['prompt']} tokens."]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=LAYERS, help="depths of the policy")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of the responses")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the results")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Count, write, print."""
    options = parser().parse_args(argv)
    report = {
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "depth": [ratios(MODELS[0], layers, options.prompt, (USUAL_LENGTH,))[0] for layers in options.layers],
        "length": {name: ratios(name, None, options.prompt, options.lengths) for name in MODELS},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "operations_scaling.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.out / "operations_scaling.md").write_text(as_markdown(report))
    print(as_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
