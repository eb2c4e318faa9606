"""DPO-Positive on a model's own right and wrong responses."""

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer

from ..settings import Bounds, PositiveInt, help_from_docstring
from .sampling import (
    ProcessingClass,
    RewardFunction,
    SamplingConfig,
    load_as_configured,
    processing_class_of,
    sample_as_configured,
    training_rows,
    write_samples,
)


# DPO settings that change the loss under the penalty, with the only value they may have.
_FIXED_DPO_SETTINGS = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
    "use_weighting": False,
}


@help_from_docstring
@dataclass
class DPOPConfig(SamplingConfig, DPOConfig):
    r"""
    Configuration class for the [`DPOPTrainer`] (Smaug, https://huggingface.co/papers/2402.13228).

    This class includes only the parameters that are specific to DPO-Positive. [`SamplingConfig`] has the parameters of
    the sampling, which [`dpop_trainer`] does, and [`~trl.DPOConfig`] everything else.

    Parameters:
        dpop_penalty (`float`, *optional*, defaults to `50.0`):
            Weight λ of the penalty on making chosen responses less probable; `0.0` is DPO. The comparison is with the
            reference model.
        max_pairs_per_prompt (`int`, *optional*, defaults to `1`):
            Largest number of pairs of a right and a wrong response to one prompt. No response is in two pairs.

    > [!NOTE]
    > These parameters have default values different from [`~trl.DPOConfig`]:
    > - `max_length`: Defaults to `None` instead of `1024`. `max_completion_length` has bounded the responses already.
    """

    # Parameters whose default values are overridden from DPOConfig
    max_length: int | None = field(
        default=None,
        metadata={"help": "Length to cut prompt and response to. `None` cuts nothing: sampling has bounded both."},
    )

    dpop_penalty: Annotated[float, Bounds(ge=0, lt=math.inf)] = 50.0
    max_pairs_per_prompt: PositiveInt = 1

    def __post_init__(self):
        SamplingConfig.__post_init__(self)
        DPOConfig.__post_init__(self)
        for name, only in _FIXED_DPO_SETTINGS.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"DPO-Positive is a penalty on the standard DPO loss: `{name}` must stay {only!r}, got "
                    f"{getattr(self, name)!r}."
                )


class DPOPTrainer(DPOTrainer):
    r"""
    Trainer for DPO-Positive (DPOP), https://huggingface.co/papers/2402.13228, equation 3:

    $$ -\log\sigma\Big(\beta\big[\log\tfrac{\pi(y_w)}{\pi_\text{ref}(y_w)} - \log\tfrac{\pi(y_l)}{\pi_\text{ref}(y_l)}
    - \lambda\max\big(0, \log\tfrac{\pi_\text{ref}(y_w)}{\pi(y_w)}\big)\big]\Big) $$

    DPO only asks that the chosen response $y_w$ gains on the rejected response $y_l$. Both may become less probable
    meanwhile, in particular if they share most of their tokens, as solutions of one problem do. The penalty acts when
    the chosen response becomes less probable.

    Everything but the loss is TRL's, including the data: `prompt`, `chosen`, `rejected`, and `images` if there are
    any. Besides TRL's metrics there is `dpop/penalty`, the mean of max(0, ·) before the weight λ.

    Args:
        *args, **kwargs:
            As for [`~trl.DPOTrainer`], with `args` a [`DPOPConfig`].
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, DPOPConfig):
            raise TypeError(f"`args` must be a `DPOPConfig`, got {type(self.args).__name__}.")
        self.dpop_penalties: dict[str, list[float]] = {"train": [], "eval": []}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        """
        TRL's loss with the penalty.

        TRL computes and logs as always. The penalty uses the log-probabilities of the same forward passes, so no pass
        is repeated and no private method of TRL is overridden. `compute_ref_log_probs` gives the reference's
        log-probabilities; they go in with the batch, where TRL looks for precomputed ones. A forward hook keeps the
        policy's.
        """
        if not self.precompute_ref_logps:
            chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        forwards: list[Any] = []
        hook = model.register_forward_hook(lambda module, args, output: forwards.append(output))
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.precompute_ref_logps = precomputed
            hook.remove()
        # (2B, T - 1), 0 outside the responses; the first half is the chosen ones. A second forward is only made for
        # `return_outputs`, without gradient.
        chosen_logps, rejected_logps = forwards[0].log_probs.sum(1).chunk(2)
        chosen_ratios = chosen_logps - inputs["ref_chosen_logps"]
        margins = chosen_ratios - (rejected_logps - inputs["ref_rejected_logps"])
        penalties = torch.relu(-chosen_ratios)
        dpo = -F.logsigmoid(self.beta * margins)
        dpop = -F.logsigmoid(self.beta * (margins - self.args.dpop_penalty * penalties))

        mode = "train" if self.model.training else "eval"
        self.dpop_penalties[mode].append(self.accelerator.gather(penalties.detach()).mean().item())
        # Add a difference, so that TRL's other terms, such as the loss of a mixture of experts, stay in the loss.
        difference = (dpop - dpo).mean()
        return (result[0] + difference, result[1]) if return_outputs else result + difference

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if penalties := self.dpop_penalties[mode]:
            logs["eval_dpop/penalty" if mode == "eval" else "dpop/penalty"] = sum(penalties) / len(penalties)
            self.dpop_penalties[mode] = []
        super().log(logs, start_time)


def preference_pairs(
    samples: Dataset,
    dataset: Dataset,
    *,
    reward_threshold: float = 0.0,
    max_pairs_per_prompt: int = 1,
    keep_truncated: bool = False,
    seed: int = 0,
) -> Dataset:
    """
    Pair right with wrong responses to the same prompt.

    Args:
        samples ([`~datasets.Dataset`]):
            Result of [`sample_responses`].
        dataset ([`~datasets.Dataset`]):
            Data set of the sampled prompts.
        reward_threshold (`float`, *optional*, defaults to `0.0`):
            Responses with a greater reward are right, all others wrong; responses with reward nan are neither.
        max_pairs_per_prompt (`int`, *optional*, defaults to `1`):
            Largest number of pairs per prompt. No response is in two pairs, and of equal responses only one is used.
        keep_truncated (`bool`, *optional*, defaults to `False`):
            Whether unfinished responses may be in a pair.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the pairing.

    Returns:
        [`~datasets.Dataset`]: Columns `prompt`, `chosen` and `rejected`, and `images` if there are any, for
        [`~trl.DPOTrainer`].
        Raises `ValueError` if no prompt has both a right and a wrong response.
    """
    right: dict[int, dict[str, None]] = {}
    wrong: dict[int, dict[str, None]] = {}
    for prompt, response, reward, finished in zip(
        samples["prompt_index"], samples["response"], samples["reward"], samples["finished"], strict=True
    ):
        if finished or keep_truncated:
            if reward > reward_threshold:
                right.setdefault(prompt, {})[response] = None
            elif reward <= reward_threshold:
                wrong.setdefault(prompt, {})[response] = None
    rng = random.Random(seed)
    pairs = []
    for prompt in sorted(right.keys() & wrong.keys()):
        # A reward that looks at the tokens may call the same text right and wrong. Such a pair tells nothing.
        chosen = [response for response in right[prompt] if response not in wrong[prompt]]
        rejected = [response for response in wrong[prompt] if response not in right[prompt]]
        rng.shuffle(chosen)
        rng.shuffle(rejected)
        together = list(zip(chosen, rejected, strict=False))[:max_pairs_per_prompt]
        pairs += [(prompt, *pair) for pair in together]
    if not pairs:
        raise ValueError(
            f"{len(samples)} responses to {len(set(samples['prompt_index']))} prompts make no pair: with "
            f"reward_threshold={reward_threshold} and keep_truncated={keep_truncated}, {len(right)} prompts have a "
            f"right response, {len(wrong)} a wrong one and {len(right.keys() & wrong.keys())} both."
        )
    indices, chosen, rejected = zip(*pairs, strict=True)
    return training_rows(dataset, indices, chosen=chosen, rejected=rejected)


def dpop_trainer(
    model: str | PreTrainedModel,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    args: DPOPConfig,
    train_dataset: Dataset,
    processing_class: ProcessingClass | None = None,
    *,
    eval_dataset: Dataset | None = None,
    callbacks: list[TrainerCallback] | None = None,
    peft_config: PeftConfig | None = None,
) -> DPOPTrainer:
    """
    Sample from a model, pair its right with its wrong responses, and build the trainer on them.

    First the samples are written to `samples.jsonl` in `output_dir`.

    Example:

    ```python
    from sapo_trl.recipes import DPOPConfig, dpop_trainer
    from sapo_trl.rewards import accuracy_reward

    trainer = dpop_trainer("Qwen/Qwen2.5-1.5B", accuracy_reward, DPOPConfig("outputs/dpop"), train_dataset)
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Name or folder of the model, or the model itself, which is then trained; a copy of it is the reference.
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions as [`~trl.GRPOTrainer`] calls them; see [`sample_responses`].
        args ([`DPOPConfig`]):
            Settings.
        train_dataset ([`~datasets.Dataset`]):
            Prompts, with images if there are any, and the columns that the rewards need.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Defaults to the processing class of the model's name.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Preference data to evaluate on.
        callbacks (`list[TrainerCallback]`, *optional*):
            Callbacks of the trainer.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train instead of the model.

    Returns:
        [`DPOPTrainer`]: Ready to train.
        Raises `ValueError` if the samples make no pair; they are written all the same.
    """
    processing_class = processing_class_of(model, processing_class, args)
    policy = load_as_configured(model, args) if isinstance(model, str) else model
    samples = sample_as_configured(args, policy, processing_class, train_dataset, reward_funcs, seed=args.seed)
    del policy  # TRL loads its own where there is a name
    path = Path(args.output_dir) / "samples.jsonl"
    write_samples(samples, path)
    pairs = preference_pairs(
        samples,
        train_dataset,
        reward_threshold=args.reward_threshold,
        max_pairs_per_prompt=args.max_pairs_per_prompt,
        keep_truncated=args.keep_truncated,
        seed=args.seed,
    )
    # With an adapter, the reference is the model with the adapter off. A model with a name is loaded again.
    needs_copy = not isinstance(model, str) and peft_config is None and not is_peft_model(model)
    return DPOPTrainer(
        model=model,
        ref_model=copy.deepcopy(model) if needs_copy else None,
        args=args,
        train_dataset=pairs,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
        callbacks=callbacks,
        peft_config=peft_config,
    )
