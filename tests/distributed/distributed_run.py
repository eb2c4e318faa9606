"""A short run for `test_distributed.py` to launch in one process or several; writes the weights and the log."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import set_seed

from sapo_trl import SAPOTrainer, SegmentValueHead
from sapo_trl.callbacks import RolloutCallback
from sapo_trl.critic.value_head import backbone_of
from sapo_trl.distributed import gathered
from sapo_trl.embedded import build_processor, build_tokenizer
from sapo_trl.rewards.completion import completion_text
from sapo_trl.rewards.steps import StepReward
from tests.exact_arithmetic import exact_lm_head, make_exact
from tests.testing_utils import (
    FAMILIES,
    advantages_of_tokens,
    fixed_rollout,
    length_reward,
    logged,
    never_logged,
    sapo_config,
)


def completions_of_prompts(prompts: list, trainer: SAPOTrainer) -> list[list[int]]:
    """Unequal lengths, and a function of the prompt alone, wherever it is processed."""
    rows = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(sum(map(ord, json.dumps(prompt, default=lambda image: ""))))
        length = int(torch.randint(1, trainer.max_completion_length + 1, (), generator=generator))
        rows.append(torch.randint(20, 250, (length,), generator=generator).tolist())
    return rows


def halved_reward(completions, **kwargs) -> list[float]:
    """[`length_reward`], half of it in the middle of the text."""
    rewards = length_reward(**kwargs)
    middles = [len(completion_text(completion)) // 2 or None for completion in completions]
    return [StepReward([(0, middle, r / 2)], final=r / 2) for middle, r in zip(middles, rewards, strict=True)]


class LastRollout(RolloutCallback):
    """Keeps what the models say of the latest rollout."""

    def on_rollout(self, args, state, control, rollout, metrics):
        self.logps, self.values = rollout.logps.clone(), rollout.values.clone()
        # By place in the response: the processes' tensors have other numbers of columns.
        rows = zip(rollout.policy_mask, rollout.segments.mask, strict=True)
        self.learned = [learned[tokens].tolist() for learned, tokens in rows]


def elements(module: torch.nn.Module) -> int:
    """Of its parameters, those that are in this process's memory."""
    parameters = [
        parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in module.parameters()
    ]
    return sum(parameter.numel() for parameter in parameters)


def spoil(trainer: SAPOTrainer, name: str, step: int) -> None:
    """Let a loss be no number in one step, on the last process alone."""
    loss_of = getattr(trainer, name)
    is_last = trainer.accelerator.process_index == trainer.accelerator.num_processes - 1

    def spoiled(*args):
        return loss_of(*args) * (torch.nan if is_last and trainer.state.global_step == step else 1.0)

    setattr(trainer, name, spoiled)


def note_micro_batches(trainer: SAPOTrainer) -> list[tuple[int, int]]:
    """Rows and columns of what the policy is about to be trained on, micro-batch for micro-batch."""
    shapes = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.is_grad_enabled():
            shapes.append(tuple(kwargs["input_ids"].shape))

    backbone_of(trainer.accelerator.unwrap_model(trainer.model)).register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def note_response_weights(trainer: SAPOTrainer) -> list[list[float]]:
    """The weights of each micro-batch's responses."""
    objective, weights = trainer.policy_objective, []

    def noted(forward, batch, totals):
        scale = totals.response_scale
        if scale is not None:
            dependency = batch["response_dependency"]
            weights.append(scale.weights(dependency, trainer.args.smallest_response_weight).tolist())
        return objective(forward, batch, totals)

    trainer.policy_objective = noted
    return weights


def main(
    folder: Path, name: str, global_batch: int, settings: dict, before_training: Callable[[], None] = lambda: None
) -> None:
    checkpoint = settings.get("resume_from_checkpoint")
    tokenizer = build_tokenizer()
    family = FAMILIES[name](tokenizer if name == "qwen2" else build_processor(tokenizer))
    settings = dict(settings)
    spoiled, numbered = settings.pop("spoiled", None), settings.pop("numbered", False)
    in_float64, value_model = settings.pop("in_float64", False), None
    frozen_tower, equal_advantages = settings.pop("frozen_tower", False), settings.pop("equal_advantages", False)
    with_lora = settings.pop("lora", False)
    model, loads_it = settings.pop("model", None), settings.pop("loads_it", False)
    if model is None:
        # Before the arguments, which tell transformers about ZeRO-3: it cannot make Qwen2.5-VL's weights in pieces.
        model = family.build_model()
    args = sapo_config(
        folder,
        max_grad_norm=1e6,
        critic_max_grad_norm=1e6,
        num_mini_batches=1,
        per_device_train_batch_size=global_batch // int(os.environ.get("WORLD_SIZE", "1")),
        **{"optim": "sgd", **settings},
    )
    if loads_it:
        model = family.model_class.from_pretrained(model)
    if frozen_tower:
        model.model.visual.requires_grad_(False)
    if in_float64:
        model = make_exact(model)
        set_seed(0)
        value_model = SegmentValueHead.from_policy(model).double()
    before_training()
    dataset = family.dataset(max(8, args.gradient_accumulation_steps * global_batch))  # a rollout's at least
    if numbered:  # else only a few texts, and responses, are different ones
        dataset = dataset.map(
            lambda row, index: {"prompt": [{"role": "user", "content": f"{index}."}]}, with_indices=True
        )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if with_lora or args.critic == "adapter" else None
    trainer = SAPOTrainer(
        model=model,
        reward_funcs=halved_reward,
        args=args,
        train_dataset=dataset,
        processing_class=family.processing_class,
        # Continuations need the trainer's own generation.
        rollout_func=None if args.critic in ("monte_carlo", "tree") else fixed_rollout(completions_of_prompts),
        peft_config=lora,
        value_model=value_model,
    )
    if equal_advantages:
        trainer.estimate_advantages = advantages_of_tokens
    if spoiled is not None:
        spoil(trainer, *spoiled)
    last = LastRollout()
    trainer.add_callback(last)
    micro_batches, weights = note_micro_batches(trainer), note_response_weights(trainer)
    with exact_lm_head() if in_float64 else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=checkpoint)
    names = ["policy_loss", "critic/loss", "critic/grad_norm", "reward", "kl", "segments/count", "segments/max_length"]
    names += ["positive_lm_loss", "advantages/abs_mean", "policy_mask/share", "monte_carlo/tokens", "tree/tokens"]
    names += ["visual_dependency/mean", "response_weight/max", "perception_kl"]
    names += ["grad_norm", "skipped_steps", "critic/gated", "critic/monte_carlo_explained_variance"]
    policy = trainer.accelerator.unwrap_model(trainer.model)
    stage = 0
    if trainer.is_deepspeed_enabled:
        import deepspeed

        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
    state = {
        "world_size": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "zero_stage": stage,
        # Elements in this process's hands: with ZeRO-3 and FSDP2 a share.
        "policy_elements": elements(policy),
    }
    critic = trainer.critic.value_head if trainer.critic is not None else torch.nn.Module()
    state["critic_elements"] = elements(critic)
    modules = [policy, critic]
    with contextlib.ExitStack() as stack:
        if stage == 3:
            parameters = [parameter for module in modules for parameter in module.parameters()]
            stack.enter_context(deepspeed.zero.GatheredParameters(parameters))
        for name, module in zip(("policy", "critic"), modules, strict=True):
            state[name] = {key: gathered(tensor).clone() for key, tensor in module.state_dict().items()}
    state |= {
        "logps": last.logps,
        "values": last.values,
        "micro_batches": micro_batches,
        "response_weights": weights,
        "learned": last.learned,
        "log": {name: [] if never_logged(trainer, name) else logged(trainer, name) for name in names},
    }
    torch.save(state, folder / f"rank{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
    # Threads of a group that is still open may abort the interpreter's exit.
    PartialState().destroy_process_group()
