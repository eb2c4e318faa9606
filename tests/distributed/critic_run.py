"""Gradients of a critic, for `test_distributed.py` to launch in two processes; writes what each of them had."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from peft import LoraConfig, get_peft_model
from PIL import Image

from sapo_trl import SegmentValueHead
from sapo_trl.critic.adapter import CriticAdapter
from sapo_trl.critic.ladder import LadderSizes
from sapo_trl.critic.training import Critic
from sapo_trl.embedded import build_processor, build_tokenizer
from tests.testing_utils import FAMILIES, sapo_config


def build_value_head(mode: str) -> SegmentValueHead:
    """An adapter critic with LoRA on the vision tower too, or a shared one; each process has drawn another head."""
    rank = PartialState().process_index
    if mode in ("shared", "ladder"):
        torch.manual_seed(rank)
        return SegmentValueHead(16, ladder=LadderSizes(2, 64, 1) if mode == "ladder" else None)
    policy = FAMILIES["qwen2_5_vl"](build_processor(build_tokenizer())).build_model()
    policy = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj", "qkv"], init_lora_weights=False))
    adapter = CriticAdapter(policy)
    torch.manual_seed(rank)
    return SegmentValueHead(64, adapter=adapter)


def model_inputs(mode: str, has_image: bool) -> dict[str, torch.Tensor]:
    """Other ones on each process."""
    rank = PartialState().process_index
    if mode in ("shared", "ladder"):
        return {"hidden_states": torch.randn(2, 5, 16)}
    processor = build_processor(build_tokenizer())
    prompt = [{"role": "user", "content": [{"type": "text", "text": "abcdefg"[rank:]}]}]
    if has_image:
        prompt[0]["content"].insert(0, {"type": "image", "image": Image.new("RGB", (56, 56), "red")})
    return processor.apply_chat_template(
        [prompt], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def copied(tensors: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    return {name: None if tensor is None else tensor.detach().clone() for name, tensor in tensors.items()}


def main(folder: Path, mode: str) -> None:
    # The arguments first: they start accelerate's state anew.
    args = sapo_config(folder, critic=mode, critic_weight_decay=0.1, critic_max_grad_norm=1e6, optim="adamw_torch")
    accelerator = Accelerator(cpu=True)
    value_head = build_value_head(mode)
    critic = Critic(value_head, args, accelerator, [name for name, _ in value_head.learned_parameters()])
    learned = dict(critic.value_head.learned_parameters())
    steps = []
    # In the first step one process has an image, in the second none has.
    for has_image in (accelerator.process_index == 0, False):
        step = {"before": copied(learned)}
        with critic.accumulate():
            critic.backward(critic.module(**model_inputs(mode, has_image)).square().sum())
        step["own"] = copied({name: parameter.grad for name, parameter in learned.items()})
        critic.clip_gradient()
        step["mean"] = copied({name: parameter.grad for name, parameter in learned.items()})
        critic.step()
        steps.append(step | {"after": copied(learned)})
    torch.save(steps, folder / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    PartialState().destroy_process_group()
