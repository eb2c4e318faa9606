"""Settings of `sapo-trl eval`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..data.images import ImageLimits
from ..names import nearest_name
from ..settings import (
    Bounds,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    check_settings,
    help_from_docstring,
)


IDENTITY = (
    "model",
    "revision",
    "dtype",
    "adapter",
    "backend",
    "temperature",
    "top_p",
    "max_new_tokens",
    "n",
    "seed",
    "limit",
    "min_pixels",
    "max_pixels",
    "chat_template_kwargs",
    "harness",
)
"""Settings that decide the generations. A run folder holds generations with one value of each setting."""


@help_from_docstring
@dataclass
class EvalArguments:
    r"""
    Settings of `sapo-trl eval`.

    Args:
        > Parameters that control the model and the benchmarks

        model (`str`):
            Folder, hub id, or `"embedded"`: the small model of the embedded task.
        benchmarks (`list[str]`):
            Names of benchmarks, separated by commas or spaces; `NAME=PATH` reads local rows. `PATH` is a folder or a
            file (parquet, JSONL) with the published columns. Without it, the rows come from the hub. With a run file
            of `sapo-trl train` as `--config`, `task` is the test split of the file's data, and the default.
        revision (`str`, *optional*):
            Branch, tag or commit of the model.
        adapter (`str`, *optional*):
            Folder or hub id of a PEFT adapter for the model.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights. `"auto"` is the checkpoint's.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run code that comes with the model.

        > Parameters that control sampling

        backend (`str`, *optional*, defaults to `"transformers"`):
            Library that generates.
        temperature (`float`, *optional*, defaults to `0.6`):
            Temperature of the sampling; `0` decodes greedily.
        top_p (`float`, *optional*, defaults to `0.95`):
            Probability mass of the most probable tokens to sample from, in (0, 1].
        max_new_tokens (`int`, *optional*, defaults to `2048`):
            Longest generation, in tokens.
        n (`int`, *optional*, defaults to `1`):
            Generations of each problem.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling. Each generation has a seed of its own, made of this one, its benchmark, its problem
            and its number.
        limit (`int`, *optional*):
            Number of problems of each benchmark to evaluate, from the first on; by default all.
        batch_size (`int`, *optional*):
            Generations at a time; by default 16, with vLLM 256. Finished generations are saved after each batch.
        min_pixels (`int`, *optional*):
            Enlarge smaller images to this many pixels.
        max_pixels (`int`, *optional*):
            Reduce larger images to this many pixels.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Arguments of the chat template, such as `{"enable_thinking": false}`.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.9`):
            Share of the GPU's memory for vLLM.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that share the model in vLLM.
        vllm_max_model_length (`int`, *optional*):
            Longest prompt with its generation in vLLM, in tokens; by default the model's limit.

        > Parameters that control results

        output_dir (`str`, *optional*):
            Run folder; by default `outputs/eval-MODEL`. The same command continues the run in it.
        score_only (`bool`, *optional*, defaults to `False`):
            Generate nothing: score the stored generations of `output_dir` again.
        page_answers (`int`, *optional*, defaults to `5000`):
            Largest number of generations on the page.

        > Parameters that control the judge

        judge_url (`str`, *optional*):
            OpenAI-compatible endpoint of the judge, such as `http://localhost:8000/v1`. Without one, rules decide
            alone.
        judge_model (`str`, *optional*):
            Model to ask at the judge's endpoint.
        judge_when (`str`, *optional*, defaults to `"wrong"`):
            Ask the judge about `"all"` generations, or only if the rules found no right answer (`"wrong"`).
        judge_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable with the endpoint's key. The key itself is stored nowhere.
        judge_timeout (`float`, *optional*, defaults to `60.0`):
            Seconds from a question to the judge to the end of its answer.
        judge_retries (`int`, *optional*, defaults to `4`):
            Number of times to repeat a failed request to the judge. Each repetition waits for the seconds that the
            endpoint names, else for 1, 2, 4, …, at most 30 seconds.
        judge_workers (`int`, *optional*, defaults to `8`):
            Requests to the judge at a time.

        > Parameters that control the harness

        harness (`str`, *optional*, defaults to `"sapo-trl"`):
            Harness that runs the benchmarks. `"lmms-eval"` runs its own tasks; it needs an environment of its own.
        harness_python (`str`, *optional*):
            Python of lmms-eval's environment.
        harness_model (`str`, *optional*):
            Name of the model's kind in lmms-eval. Defaults to `qwen2_5_vl` for transformers and `vllm` for vLLM.
    """

    model: str = ""
    benchmarks: list[str] = field(default_factory=list)
    revision: str | None = None
    adapter: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    trust_remote_code: bool = False

    backend: Literal["transformers", "vllm"] = "transformers"
    temperature: NonNegativeFloat = 0.6
    top_p: Probability = 0.95
    max_new_tokens: PositiveInt = 2048
    n: PositiveInt = 1
    seed: int = 0
    limit: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None
    chat_template_kwargs: dict[str, Any] | str | None = None
    vllm_gpu_memory_utilization: Annotated[float, Bounds(gt=0, le=1)] = 0.9
    vllm_tensor_parallel_size: PositiveInt = 1
    vllm_max_model_length: PositiveInt | None = None

    output_dir: str | None = None
    score_only: bool = False
    page_answers: NonNegativeInt = 5000

    judge_url: str | None = None
    judge_model: str | None = None
    judge_when: Literal["wrong", "all"] = "wrong"
    judge_key_env: str = "OPENAI_API_KEY"
    judge_timeout: PositiveFloat = 60.0
    judge_retries: NonNegativeInt = 4
    judge_workers: PositiveInt = 8

    harness: Literal["sapo-trl", "lmms-eval"] = "sapo-trl"
    harness_python: str | None = None
    harness_model: str | None = None

    def __post_init__(self):
        if not self.model and not (self.score_only and self.output_dir):
            raise ValueError(
                "`model` is not set: 'embedded', a folder or a hub id. (A run file's `output_dir` has one only "
                "after training.)"
            )
        self.benchmarks = [name for entry in self.benchmarks for name in entry.split(",") if name]
        check_settings(self)
        self.chat_template_kwargs = _from_json(self.chat_template_kwargs)
        _ = ImageLimits(self.min_pixels, self.max_pixels)
        if self.judge_url and not self.judge_model:
            raise ValueError("`judge_url` is set, `judge_model` is not: name the endpoint's model.")
        if self.judge_model and not self.judge_url:
            raise ValueError("`judge_model` is set, `judge_url` is not: name the endpoint.")
        if self.judge_url and not self.judge_url.startswith(("http://", "https://")):
            raise ValueError(f"`judge_url` must start with http:// or https://, got {self.judge_url!r}.")

    @property
    def model_name(self) -> str:
        """The model's short name, for tables and folders."""
        name = Path(self.model).name if os.path.isdir(self.model) else self.model.rpartition("/")[2]
        if self.adapter:
            name += f" + {Path(self.adapter).name}"
        return name

    @property
    def run_folder(self) -> Path:
        """`output_dir`, or a folder named after the model."""
        if self.output_dir:
            return Path(self.output_dir)
        return Path("outputs") / ("eval-" + re.sub(r"[^\w.-]+", "-", self.model_name))

    def identity(self) -> dict[str, Any]:
        """The settings that decide the generations."""
        settings = asdict(self)
        return {name: settings[name] for name in IDENTITY}


def _from_json(value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        pass
    if value is not None and not isinstance(value, dict):
        raise ValueError(
            f'`chat_template_kwargs` must name arguments, such as {{"enable_thinking": false}}, got {value!r}.'
        )
    return value


def chosen_benchmarks(entries: Iterable[str], known: Iterable[str]) -> dict[str, str | None]:
    """
    Names and local paths of `benchmarks`.

    Args:
        entries (`Iterable[str]`): entries `NAME` or `NAME=PATH`.
        known (`Iterable[str]`): all known names.

    Returns:
        `dict[str, str | None]`: path by name, `None` for the published data set.

    Raises:
        ValueError: for an empty list, an unknown name, a repeated name, or a path that does not exist.
    """
    known = list(known)
    chosen: dict[str, str | None] = {}
    for entry in entries:
        name, has_path, path = entry.partition("=")
        if name not in known:
            raise ValueError(f"benchmarks: {name!r} is none of {', '.join(known)}.{nearest_name(name, known)}")
        if name in chosen:
            raise ValueError(f"benchmarks: {name!r} occurs twice.")
        if has_path and not os.path.exists(path):
            raise ValueError(f"benchmarks: {entry!r} names the path {path!r}, which does not exist.")
        chosen[name] = path if has_path else None
    if not chosen:
        raise ValueError(f"`benchmarks` is empty: name some of {', '.join(known)}.")
    return chosen
