"""ReST-EM: sample responses, keep the right ones, fine-tune the original model on them, repeat."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..settings import PositiveInt, help_from_docstring
from .sampling import (
    ProcessingClass,
    RewardFunction,
    SamplingConfig,
    check_prompts,
    load_as_configured,
    processing_class_of,
    sample_as_configured,
    training_rows,
    write_samples,
)


@help_from_docstring
@dataclass
class ReSTEMConfig(SamplingConfig, SFTConfig):
    r"""
    Configuration class for [`ReSTEM`] (https://huggingface.co/papers/2312.06585).

    This class includes only the parameters that are specific to ReST-EM. [`SamplingConfig`] has the parameters of the
    sampling, [`~trl.SFTConfig`] the parameters of the fine-tuning. `max_steps` and `num_train_epochs` are for one
    iteration.

    Parameters:
        max_kept_per_prompt (`int`, *optional*, defaults to `10`):
            Largest number of responses to one prompt to train on. Without it easy prompts crowd out the others.
        num_iterations (`int`, *optional*, defaults to `2`):
            Number of times to sample and fine-tune.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `max_length`: Defaults to `None` instead of `1024`. `max_completion_length` has bounded the responses already,
    >   and cutting prompt or response once more would train on text that was not sampled.
    """

    # Parameters whose default values are overridden from SFTConfig
    max_length: int | None = field(
        default=None,
        metadata={"help": "Length to cut prompt and response to. `None` cuts nothing: sampling has bounded both."},
    )

    max_kept_per_prompt: PositiveInt = 10
    num_iterations: PositiveInt = 2

    def __post_init__(self):
        SamplingConfig.__post_init__(self)
        SFTConfig.__post_init__(self)


class ReSTEM:
    """
    Expectation-maximization for policies (ReST-EM, https://huggingface.co/papers/2312.06585).

    Each iteration samples responses from the current policy and keeps the right ones (the E-step), then fine-tunes the
    *original* model on them (the M-step). So it stays closer to its start than with fine-tuning of the latest policy.
    The fine-tuning is TRL's, on prompt-completion data, so that only the response is learned.

    Example:

    ```python
    from sapo_trl.recipes import ReSTEM, ReSTEMConfig
    from sapo_trl.rewards import accuracy_reward

    recipe = ReSTEM("Qwen/Qwen2.5-1.5B", accuracy_reward, ReSTEMConfig("outputs/restem"), train_dataset)
    trainer = recipe.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The original model: a name or folder, loaded anew in every iteration, or an object, which is copied in
            every iteration and never changed. A name needs less memory.
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions as [`~trl.GRPOTrainer`] calls them; see [`sample_responses`].
        args ([`ReSTEMConfig`]):
            Settings.
        train_dataset ([`~datasets.Dataset`]):
            Prompts, with images if there are any, and the columns that the rewards need.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Defaults to the processing class of the model's name.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Prompt-completion data for the fine-tuning to evaluate on.
        callbacks (`list[TrainerCallback]`, *optional*):
            Callbacks of every fine-tuning.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to fine-tune instead of the model.

    Raises:
        ValueError: for data without prompts, or a model object without `processing_class`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: ReSTEMConfig,
        train_dataset: Dataset,
        processing_class: ProcessingClass | None = None,
        *,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
    ):
        check_prompts(train_dataset)
        self.model = model
        self.reward_funcs = reward_funcs
        self.args = args
        self.train_dataset = train_dataset
        self.processing_class = processing_class_of(model, processing_class, args)
        self.eval_dataset = eval_dataset
        self.callbacks = callbacks
        self.peft_config = peft_config
        self.trainer: SFTTrainer | None = None
        """The trainer of the last iteration, `None` before the first."""

    def train(self) -> SFTTrainer:
        """
        Run all iterations.

        Every iteration writes its samples to `iteration_N.jsonl` in `output_dir` before it trains on them, each with
        whether it was kept, and its model to the folder `iteration_N` unless `save_strategy` is `"no"`. The share kept
        and the mean reward are logged as `restem/kept_fraction` and `restem/reward`.

        Returns:
            [`~trl.SFTTrainer`]: The trainer of the last iteration; its `model` is the result.
            Raises `ValueError` if an iteration keeps nothing; its samples are written all the same.
        """
        self.trainer = None  # of an earlier call
        for iteration in range(1, self.args.num_iterations + 1):
            samples = self.e_step(iteration)
            kept = samples.select([row for row, kept in enumerate(samples["kept"]) if kept])
            self.trainer = self.m_step(kept, iteration)
            rewards = [reward for reward in samples["reward"] if not math.isnan(reward)]
            self.trainer.log(
                {
                    "restem/iteration": iteration,
                    "restem/kept_fraction": len(kept) / len(samples),
                    "restem/reward": sum(rewards) / len(rewards),
                }
            )
            if self.args.save_strategy != "no":
                self.trainer.save_model()
        return self.trainer

    def e_step(self, iteration: int) -> Dataset:
        """
        Sample from the current policy, the original model in the first iteration, and write the samples down.

        Returns:
            [`~datasets.Dataset`]: The columns of [`sample_responses`], and `kept`.
            Raises `ValueError` if nothing is kept.
        """
        args = self.args
        policy = self.model if self.trainer is None else self.trainer.model
        if isinstance(policy, str):
            policy = load_as_configured(policy, args)
        samples = sample_as_configured(
            args,
            policy,
            self.processing_class,
            self.train_dataset,
            self.reward_funcs,
            # Another seed in every iteration: a policy that has hardly changed would repeat itself.
            seed=args.seed + iteration - 1,
        )
        kept = kept_rows(
            samples,
            reward_threshold=args.reward_threshold,
            max_kept_per_prompt=args.max_kept_per_prompt,
            keep_truncated=args.keep_truncated,
        )
        is_kept = [False] * len(samples)
        for row in kept:
            is_kept[row] = True
        samples = samples.add_column("kept", is_kept)
        path = Path(args.output_dir) / f"iteration_{iteration}.jsonl"
        write_samples(samples, path)
        if not kept:
            best = max((reward for reward in samples["reward"] if not math.isnan(reward)), default=math.nan)
            cut_off = len(samples) - sum(samples["finished"])
            raise ValueError(
                f"Iteration {iteration} sampled {len(samples)} responses to {len(self.train_dataset)} prompts and "
                f"kept none: the best reward is {best}, reward_threshold={args.reward_threshold} must be exceeded, "
                f"and {cut_off} responses were cut off at max_completion_length={args.max_completion_length} with "
                f"keep_truncated={args.keep_truncated}. The samples are in {path}."
            )
        return samples

    def m_step(self, kept: Dataset, iteration: int) -> SFTTrainer:
        """Fine-tune the original model on kept samples. Returns the trainer, whose `model` is the new policy."""
        self.trainer = None  # frees its model and optimizer before the new ones are made
        args = copy.copy(self.args)
        args.output_dir = str(Path(self.args.output_dir) / f"iteration_{iteration}")
        trainer = SFTTrainer(
            model=self.model if isinstance(self.model, str) else copy.deepcopy(self.model),
            args=args,
            train_dataset=training_rows(self.train_dataset, kept["prompt_index"], completion=kept["response"]),
            eval_dataset=self.eval_dataset,
            processing_class=self.processing_class,
            callbacks=self.callbacks,
            peft_config=self.peft_config,
        )
        trainer.train()
        return trainer


def kept_rows(
    samples: Dataset, *, reward_threshold: float, max_kept_per_prompt: int, keep_truncated: bool = False
) -> list[int]:
    """
    Rows of [`sample_responses`] to train on.

    Args:
        samples ([`~datasets.Dataset`]):
            Columns `prompt_index`, `response`, `reward` and `finished`.
        reward_threshold (`float`):
            Greater rewards are kept; equal rewards and nan are not.
        max_kept_per_prompt (`int`):
            Largest number of rows per prompt. The highest rewards are kept, among equal ones the first.
        keep_truncated (`bool`, *optional*, defaults to `False`):
            Whether unfinished responses may be kept.

    Returns:
        `list[int]`: Row numbers in ascending order. Of equal responses to a prompt, only the first is among them.
    """
    candidates: dict[int, dict[str, int]] = {}
    rewards = samples["reward"][:]
    for row, (prompt, response, reward, finished) in enumerate(
        zip(samples["prompt_index"], samples["response"], rewards, samples["finished"], strict=True)
    ):
        if reward > reward_threshold and (finished or keep_truncated):
            candidates.setdefault(prompt, {}).setdefault(response, row)
    kept: list[int] = []
    for rows in candidates.values():
        kept += sorted(rows.values(), key=lambda row: -rewards[row])[:max_kept_per_prompt]
    return sorted(kept)
