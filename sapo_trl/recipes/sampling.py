"""Scored responses of a model to the prompts of a data set: the training data of both recipes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from datasets import Dataset, Features, Value
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
)
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages
from trl.trainer.utils import create_model_from_path, is_async_callable

from ..data.columns import IMAGE_COLUMNS, row_images
from ..embedded import load_processor
from ..generation.model_settings import own_settings_ignored
from ..rewards.calls import checked_rewards
from ..settings import Bounds, PositiveInt, Probability, check_settings, help_from_docstring


ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin
RewardFunction = Callable[..., list[float | None]]

# Columns that a reward function gets under another name, or would receive twice.
_NOT_REWARD_COLUMNS = ("prompt", "prompts", "completion", "completions", "completion_ids")
# Columns that the sampling reads. Training reads the same columns, and the responses. TRL would also read `tools` and
# `chat_template_kwargs`, but not in every trainer with images.
_TRAINING_COLUMNS = ("prompt", *IMAGE_COLUMNS)


@help_from_docstring
@dataclass
class SamplingConfig:
    r"""
    The common settings of the recipes: sampling of responses, and the condition for a right response.

    Defaults come from ReST-EM (https://huggingface.co/papers/2312.06585) where the paper states them.

    Parameters:
        num_samples (`int`, *optional*, defaults to `32`):
            Responses sampled per prompt.
        sampling_temperature (`float`, *optional*, defaults to `0.7`):
            Temperature of the sampling.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass of the most probable tokens to sample from, in (0, 1]; `1.0` for all tokens.
        top_k (`int`, *optional*, defaults to `40`):
            Number of most probable tokens to sample from; `0` for all tokens.
        max_completion_length (`int`, *optional*, defaults to `2048`):
            Longest response, in tokens.
        sampling_batch_size (`int`, *optional*, defaults to `32`):
            Responses generated at once.
        reward_weights (`list[float]`, *optional*):
            Weight of each reward function in their sum. Defaults to `1.0` each.
        reward_threshold (`float`, *optional*, defaults to `0.0`):
            A response is right if its reward is greater, not if it is equal.
        keep_truncated (`bool`, *optional*, defaults to `False`):
            Whether to train on responses that `max_completion_length` has cut off. The trainers end every response
            with an end of turn, so such a response teaches to stop in the middle.
    """

    num_samples: PositiveInt = 32
    sampling_temperature: Annotated[
        float, Bounds(gt=0, lt=math.inf, note="0 would give the same response every time.")
    ] = 0.7
    top_p: Probability = 1.0
    top_k: Annotated[int, Bounds(ge=0, note="0 samples from all tokens.")] = 40
    max_completion_length: PositiveInt = 2048
    sampling_batch_size: PositiveInt = 32
    reward_weights: list[float] | None = None
    reward_threshold: float = 0.0
    keep_truncated: bool = False

    def __post_init__(self):
        check_settings(self)
        if math.isnan(self.reward_threshold):
            raise ValueError("`reward_threshold` must be a number, got nan: nothing is greater.")


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    dataset: Dataset,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    num_samples: int,
    *,
    temperature: float = 0.7,
    top_p: float = 1.0,
    top_k: int = 40,
    max_completion_length: int = 2048,
    batch_size: int = 32,
    reward_weights: Sequence[float] | None = None,
    seed: int = 0,
    disable_tqdm: bool = False,
) -> Dataset:
    """
    Sample responses to every prompt and score them.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to sample from. Its mode, training or evaluation, is the same afterwards.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Its tokenizer or processor.
        dataset ([`~datasets.Dataset`]):
            Column `prompt` (messages or text), `images` or `image` if there are any, and the rewards' columns.
        reward_funcs (`Callable` or `list[Callable]`):
            Called as by [`~trl.GRPOTrainer`]: with `prompts`, `completions` (messages where the prompts are),
            `completion_ids` and every other column of the data set. Arguments that only a running trainer has, such as
            `trainer_state`, are missing. Called after every batch, so that a broken function fails early.
            Failing for one completion costs no other its reward.
        num_samples (`int`):
            Responses per prompt.
        temperature, top_p, top_k, max_completion_length, batch_size, reward_weights:
            As in [`SamplingConfig`], where some names start with `sampling_`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling. The caller's random state is left as it was.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.

    Returns:
        [`~datasets.Dataset`]: `len(dataset) * num_samples` rows, grouped by prompt, with the columns
        `prompt_index` (row in `dataset`), `prompt`, `response` (text without special tokens), `reward` (weighted sum;
        nan if every reward function returned `None`) and `finished` (whether the response ended by itself). Images are
        left out: there would be `num_samples` copies of each.

        Raises `ValueError` or `TypeError` for settings, columns, reward functions or rewards that are not as above.
    """
    SamplingConfig(  # checks them
        num_samples=num_samples,
        sampling_temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_completion_length=max_completion_length,
        sampling_batch_size=batch_size,
    )
    check_prompts(dataset)
    reward_funcs, reward_weights = _checked_rewards(reward_funcs, reward_weights)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    end_token_ids = _end_token_ids(model, tokenizer)
    generation_config = GenerationConfig(
        max_new_tokens=max_completion_length,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        use_cache=True,
        eos_token_id=end_token_ids,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    prompt_indices = [i for i in range(len(dataset)) for _ in range(num_samples)]
    samples: dict[str, list] = {name: [] for name in ("prompt_index", "prompt", "response", "reward", "finished")}
    was_training = model.training
    model.eval()
    try:
        with (
            own_settings_ignored(model),
            torch.random.fork_rng(),
            tqdm(total=len(prompt_indices), desc="Sampling", unit="response", disable=disable_tqdm) as progress,
        ):
            torch.manual_seed(seed)
            for start in range(0, len(prompt_indices), batch_size):
                indices = prompt_indices[start : start + batch_size]
                distinct = {i: dataset[i] for i in dict.fromkeys(indices)}  # decodes each image once
                rows = [distinct[i] for i in indices]
                inputs = encode_prompts(processing_class, rows).to(model.device)
                sequences = model.generate(**inputs, generation_config=generation_config)
                tokens = sequences[:, inputs["input_ids"].shape[1] :]
                ids, finished = _cut_at_eos(tokens, end_token_ids)
                responses = tokenizer.batch_decode(ids, skip_special_tokens=True)
                samples["prompt_index"] += indices
                samples["prompt"] += [row["prompt"] for row in rows]
                samples["response"] += responses
                samples["reward"] += _score(reward_funcs, reward_weights, rows, responses, ids)
                samples["finished"] += finished
                progress.update(len(indices))
    finally:
        model.train(was_training)
    features = Features(
        prompt_index=Value("int64"),
        prompt=dataset.features["prompt"],  # else blocks of text and of images would be filled up to the same keys
        response=Value("string"),
        reward=Value("float64"),
        finished=Value("bool"),
    )
    return Dataset.from_dict(samples, features=features)


def encode_prompts(processing_class: ProcessingClass, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """
    Encode prompts through the same text as TRL's collators do, so that training and sampling see the same prompt.

    Returns:
        `dict[str, torch.Tensor]`: Inputs of the model's forward, left-padded: `input_ids` and `attention_mask` of
        shape `(B, T)`, and for images the processor's other outputs.
    """
    images = [row_images(row) for row in rows]
    prompts = [row["prompt"] for row in rows]
    conversational = is_conversational({"prompt": prompts[0]})
    if conversational:
        if isinstance(processing_class, ProcessorMixin):
            prompts = [prepare_multimodal_messages(*prompt) for prompt in zip(prompts, images, strict=True)]
        prompts = [apply_chat_template({"prompt": prompt}, processing_class)["prompt"] for prompt in prompts]
    return processing_class(
        text=prompts,
        **({"images": images} if any(images) else {}),
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=not conversational,  # a chat template brings its own
    )


def check_prompts(dataset: Dataset) -> None:
    """Raise `TypeError` or `ValueError` if there is nothing to sample responses to."""
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"The prompts must be a `datasets.Dataset`, got {type(dataset).__name__}: they are read more than once."
        )
    if "prompt" not in dataset.column_names:
        raise ValueError(f"The data set has no column `prompt`; it has {dataset.column_names}.")
    if len(dataset) == 0:
        raise ValueError("The data set has no rows: there is nothing to sample responses to.")


def sample_as_configured(
    args: SamplingConfig,
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    dataset: Dataset,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    seed: int,
) -> Dataset:
    """[`sample_responses`] with the settings, and in the precision, of a recipe's configuration."""
    if args.world_size > 1:
        raise ValueError(
            f"The recipes sample in one process, got world_size={args.world_size}. Sample in one process with "
            "`sample_responses`, then train with TRL's trainer in several."
        )
    if model.device != args.device:  # a quantized model is where it has to be, and cannot be moved
        model.to(args.device)
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast(args.device.type, dtype=dtype, enabled=args.bf16 or args.fp16):
        return sample_responses(
            model,
            processing_class,
            dataset,
            reward_funcs,
            args.num_samples,
            temperature=args.sampling_temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            max_completion_length=args.max_completion_length,
            batch_size=args.sampling_batch_size,
            reward_weights=args.reward_weights,
            seed=seed,
            disable_tqdm=args.disable_tqdm,
        )


def load_as_configured(model: str, args: TrainingArguments) -> PreTrainedModel:
    """Load a model as TRL's trainers do when they are given its name; safetensors only."""
    kwargs = {"trust_remote_code": args.trust_remote_code, "use_safetensors": True, **(args.model_init_kwargs or {})}
    return create_model_from_path(model, **kwargs)


def processing_class_of(
    model: str | PreTrainedModel, processing_class: ProcessingClass | None, args: TrainingArguments
) -> ProcessingClass:
    """`processing_class`, or else the class of the model's name. Raises `ValueError` if there is no name."""
    if processing_class is not None:
        return processing_class
    if not isinstance(model, str):
        raise ValueError("`processing_class` is needed with a model that is not given by its name.")
    revision = (args.model_init_kwargs or {}).get("revision", "main")
    return load_processor(model, revision=revision, trust_remote_code=args.trust_remote_code)


def training_rows(dataset: Dataset, prompt_indices: Sequence[int], **responses: Sequence[str]) -> Dataset:
    """
    Training data for TRL: the prompts of some rows, with their images, and responses to them.

    Args:
        dataset ([`~datasets.Dataset`]):
            Data set of the sampled prompts.
        prompt_indices (`Sequence[int]` of length `N`):
            Rows of the data set; a row may occur more than once.
        **responses (`Sequence[str]` of length `N`):
            Columns of responses under TRL's names: `completion`, or `chosen` and `rejected`. They become messages
            where the prompts are.
    """
    rows = dataset.select_columns([name for name in _TRAINING_COLUMNS if name in dataset.column_names])
    conversational = is_conversational({"prompt": dataset[0]["prompt"]})
    rows = rows.select(prompt_indices)
    for name, texts in responses.items():
        rows = rows.add_column(name, [_as_completion(text, conversational) for text in texts])
    return rows


def write_samples(samples: Dataset, path: Path) -> None:
    """Write one JSON object a line, in folders that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples.to_json(path)


def _as_completion(text: str, conversational: bool) -> str | list[dict[str, str]]:
    return [{"role": "assistant", "content": text}] if conversational else text


def _end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: some chat models end their turns with another token than their tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (tokenizer.eos_token_id, *configured) if token is not None})


def _cut_at_eos(tokens: torch.Tensor, end_token_ids: list[int]) -> tuple[list[list[int]], list[bool]]:
    """Rows of `(B, T)` up to and with their first end token, and which of them have one."""
    is_eos = torch.isin(tokens, torch.tensor(end_token_ids, device=tokens.device))
    finished = is_eos.any(1).tolist()
    ends = is_eos.int().argmax(1).tolist()
    rows = tokens.tolist()
    return [row[: end + 1] if done else row for row, end, done in zip(rows, ends, finished, strict=True)], finished


def _checked_rewards(
    reward_funcs: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None
) -> tuple[list[RewardFunction], list[float]]:
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not functions:
        raise ValueError("`reward_funcs` is empty: nothing tells a right response from a wrong one.")
    for function in functions:
        if not callable(function) or isinstance(function, torch.nn.Module) or is_async_callable(function):
            raise TypeError(f"`reward_funcs` must be plain functions, got {function!r}.")
    if weights is not None and len(weights) != len(functions):
        raise ValueError(
            f"`reward_weights` has {len(weights)} values for {len(functions)} reward functions; one each is needed."
        )
    return checked_rewards(functions), [1.0] * len(functions) if weights is None else list(weights)


def _score(
    functions: list[RewardFunction],
    weights: list[float],
    rows: list[dict[str, Any]],
    responses: list[str],
    completion_ids: list[list[int]],
) -> list[float]:
    prompts = [row["prompt"] for row in rows]
    conversational = is_conversational({"prompt": prompts[0]})
    completions = [_as_completion(text, conversational) for text in responses]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in _NOT_REWARD_COLUMNS}
    totals = [math.nan] * len(rows)
    for function, weight in zip(functions, weights, strict=True):
        rewards = function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        for i, reward in enumerate(rewards):
            if reward is not None:
                totals[i] = weight * float(reward) + (0.0 if math.isnan(totals[i]) else totals[i])
    return totals
