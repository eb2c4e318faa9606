"""`sapo-trl train`: [`SAPOTrainer`] from a YAML file and the command line."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from datasets import Dataset, DatasetDict, load_dataset
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from . import rewards
from .config import SAPOConfig
from .data import to_prompts
from .embedded import default_cache_dir, load_processor, make_problems, warm_start
from .stop_on_signal import StopOnSignal
from .trainer import SAPOTrainer


EMBEDDED = "embedded"
"""As a model or a data set: the task that needs no download."""


@dataclass
class TrainArguments:
    """
    What is trained on and rewarded; the model is in [`~trl.ModelConfig`], everything else in [`SAPOConfig`].

    Args:
        dataset_name (`str`, *optional*, defaults to `"embedded"`):
            `"embedded"`, a local path or a hub id. The data set has a column `prompt` as TRL expects it, or the
            columns `images`, `problem` and `answer`, which are converted.
        dataset_config (`str`, *optional*):
            Configuration of the data set.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on, if `eval_strategy` is set.
        embedded_problems (`int`, *optional*, defaults to `8192`):
            Number of problems of the embedded data set's training split, at most 23,916.
        instruction (`str`, *optional*):
            Appended to each `problem`, such as a demand to end with a `\\boxed{}`.
        reward_funcs (`list[str]`, *optional*, defaults to `["accuracy_reward"]`):
            Names from `sapo_trl.rewards`, or import paths such as `my_package.my_reward`.
    """

    dataset_name: str = field(default=EMBEDDED, metadata={"help": "'embedded', a local path or a hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    embedded_problems: int = field(default=8192, metadata={"help": "Training problems of the embedded data set."})
    instruction: str | None = field(default=None, metadata={"help": "Appended to each `problem`."})
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy_reward"],
        metadata={"help": "Names from `sapo_trl.rewards`, or import paths such as `my_package.my_reward`."},
    )


def main(argv: Sequence[str]) -> int:
    """
    Parse `argv` (with `--config FILE` if wanted), train, save. Returns the exit code: 75 if a SIGTERM ended training
    with a checkpoint.
    """
    parser = TrlParser((TrainArguments, SAPOConfig, ModelConfig), prog="sapo-trl train")
    arguments, training_args, model_args = parser.parse_args_and_config(list(argv))
    if model_args.model_name_or_path is None:
        parser.error("--model_name_or_path is required: 'embedded', a local path or a hub id")
    # What needs no model first, so that a mistake shows at once.
    reward_funcs = [find_reward(name) for name in arguments.reward_funcs]
    train_dataset = load_prompts(arguments, arguments.dataset_train_split, training_args.seed)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = load_prompts(arguments, arguments.dataset_test_split, training_args.seed)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    model = model_args.model_name_or_path
    if model == EMBEDDED:
        model = str(warm_start(default_cache_dir(), on_progress=_print_progress))
    trainer = SAPOTrainer(
        model,
        reward_funcs,
        training_args,
        train_dataset,
        eval_dataset=eval_dataset,
        processing_class=load_processor(
            model, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        ),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    stop = StopOnSignal()
    trainer.add_callback(stop)
    trainer.train(resume_from_checkpoint=_checkpoint(training_args))
    if stop.received is not None:
        trainer.accelerator.print(f"Stopped by a signal; resume from {training_args.output_dir}")
        trainer.accelerator.end_training()
        return StopOnSignal.EXIT_CODE
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    trainer.accelerator.end_training()
    return 0


def _checkpoint(training_args: SAPOConfig) -> str | None:
    """What to resume from: `True` is the newest complete checkpoint, or a fresh start where there is none yet."""
    wanted = training_args.resume_from_checkpoint
    if str(wanted).lower() in ("none", "false"):
        return None
    if str(wanted).lower() != "true":
        return wanted
    folder = training_args.output_dir
    checkpoint = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    print(f"Resuming from {checkpoint}" if checkpoint else f"No checkpoint in {folder} yet: starting anew")
    return checkpoint


def load_prompts(arguments: TrainArguments, split: str, seed: int = 0) -> Dataset:
    """Load one split as TRL trains on it. Raises `ValueError` if the split or a column is missing."""
    if arguments.dataset_name == EMBEDDED:
        n = arguments.embedded_problems if split == "train" else 512
        return to_prompts(make_problems(n, split=split, seed=seed))
    dataset = load_dataset(arguments.dataset_name, name=arguments.dataset_config)
    if not isinstance(dataset, DatasetDict) or split not in dataset:
        raise ValueError(
            f"{arguments.dataset_name!r} has no split {split!r}; it has {list(dataset)}. Set `dataset_train_split` "
            "and `dataset_test_split`."
        )
    if "prompt" in dataset[split].column_names:
        return dataset[split]
    return to_prompts(dataset[split], arguments.instruction)


def find_reward(name: str) -> Callable[..., list[float]]:
    """Find a reward function by its name in `sapo_trl.rewards` or by its import path."""
    if name in rewards.__all__:
        return getattr(rewards, name)
    module_name, _, function_name = name.rpartition(".")
    if not module_name:
        raise ValueError(f"reward_funcs={name!r} is neither one of {rewards.__all__} nor an import path such as a.b.")
    if os.getcwd() not in sys.path:  # a console script's path lacks the folder it is called in
        sys.path.append(os.getcwd())
    module = importlib.import_module(module_name)
    if not hasattr(module, function_name):
        raise ValueError(f"reward_funcs={name!r}: the module {module_name!r} has no {function_name!r}.")
    return getattr(module, function_name)


def _print_progress(progress) -> None:
    if progress.step % 20 == 0:
        print(f"warm start, step {progress.step}: reads {progress.reading_accuracy:.0%}, loss {progress.loss:.3f}")
