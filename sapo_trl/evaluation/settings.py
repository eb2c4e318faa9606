"""Settings of `sapo-trl eval`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.images import ImageLimits
from ..names import nearest_name


BACKENDS = ("transformers", "vllm")
HARNESSES = ("sapo-trl", "lmms-eval")
JUDGE_WHEN = ("wrong", "all")

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
    "harness",
)
"""Settings that decide what is generated: a run folder holds generations of one value of each."""


@dataclass
class EvalArguments:
    r"""
    What is evaluated, on what, and how.

    > Parameters that say what is evaluated

    Args:
        model (`str`):
            Folder, hub id, or `"embedded"`: the small model of the embedded task.
        benchmarks (`list[str]`):
            Names, separated by commas or spaces. `NAME=PATH` reads the rows from a folder or file (parquet, JSONL)
            with the published columns instead of from the hub.
        revision (`str`, *optional*):
            Branch, tag or commit of the model.
        adapter (`str`, *optional*):
            Folder or hub id of a PEFT adapter for the model.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"auto"` (the checkpoint's), `"bfloat16"`, `"float16"` or `"float32"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.

        > Parameters that control sampling

        backend (`str`, *optional*, defaults to `"transformers"`):
            What generates: `"transformers"` or `"vllm"`.
        temperature (`float`, *optional*, defaults to `0.6`):
            `0` decodes greedily.
        top_p (`float`, *optional*, defaults to `0.95`):
            In (0, 1].
        max_new_tokens (`int`, *optional*, defaults to `2048`):
            Longest generation.
        n (`int`, *optional*, defaults to `1`):
            Generations of each problem.
        seed (`int`, *optional*, defaults to `0`):
            Each generation has a seed of its own, made of this one, its benchmark, its problem and its number.
        limit (`int`, *optional*):
            Only the first problems of each benchmark.
        batch_size (`int`, *optional*):
            Generations at a time; what has been generated is saved after each batch. Defaults to 16 for transformers
            and 256 for vLLM.
        min_pixels (`int`, *optional*):
            Smaller images are enlarged to this many pixels.
        max_pixels (`int`, *optional*):
            Larger images are scaled down to this many pixels.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.9`):
            Share of the GPU's memory for vLLM.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that share the model.
        vllm_max_model_length (`int`, *optional*):
            Longest prompt with its generation. Defaults to the model's.

        > Parameters that control results

        output_dir (`str`, *optional*):
            Run folder. Defaults to `outputs/eval-MODEL`. The same command continues what is there.
        score_only (`bool`, *optional*, defaults to `False`):
            Generate nothing: score again all that `output_dir` holds.
        page_answers (`int`, *optional*, defaults to `5000`):
            Generations on the page at most.

        > Parameters of the judge

        judge_url (`str`, *optional*):
            OpenAI-compatible endpoint, such as `http://localhost:8000/v1`. Without one, rules decide alone.
        judge_model (`str`, *optional*):
            Its model.
        judge_when (`str`, *optional*, defaults to `"wrong"`):
            `"wrong"`: asked where the rules found no right answer. `"all"`: asked about every generation.
        judge_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable with the endpoint's key. The key itself is stored nowhere.
        judge_timeout (`float`, *optional*, defaults to `60.0`):
            Seconds from a question to the end of its answer.
        judge_retries (`int`, *optional*, defaults to `4`):
            How often a failed request is repeated: after the seconds that the endpoint names, else 1, 2, 4, …, at most
            30.
        judge_workers (`int`, *optional*, defaults to `8`):
            Requests at a time.

        > Parameters of the harness

        harness (`str`, *optional*, defaults to `"sapo-trl"`):
            `"lmms-eval"` runs its tasks in the place of ours; it needs an environment of its own.
        harness_python (`str`, *optional*):
            Python of that environment.
        harness_model (`str`, *optional*):
            Its name for the model's kind. Defaults to `qwen2_5_vl` for transformers and `vllm` for vLLM.
    """

    model: str = field(default="", metadata={"help": "'embedded', a folder or a hub id."})
    benchmarks: list[str] = field(
        default_factory=list, metadata={"help": "Names, separated by commas; NAME=PATH reads local rows."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or hub id of a PEFT adapter."})
    dtype: str = field(default="auto", metadata={"help": "auto, bfloat16, float16 or float32."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that comes with the model."})
    backend: str = field(default="transformers", metadata={"help": "What generates: transformers or vllm."})
    temperature: float = field(default=0.6, metadata={"help": "0 decodes greedily."})
    top_p: float = field(default=0.95, metadata={"help": "In (0, 1]."})
    max_new_tokens: int = field(default=2048, metadata={"help": "Longest generation."})
    n: int = field(default=1, metadata={"help": "Generations of each problem."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    limit: int | None = field(default=None, metadata={"help": "Only the first problems of each benchmark."})
    batch_size: int | None = field(default=None, metadata={"help": "Generations at a time (16; with vLLM 256)."})
    min_pixels: int | None = field(default=None, metadata={"help": "Smaller images are enlarged to this many pixels."})
    max_pixels: int | None = field(default=None, metadata={"help": "Larger images are scaled down to so many pixels."})
    vllm_gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of the GPU's memory for vLLM."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share the model."})
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Longest prompt with its generation."})
    output_dir: str | None = field(default=None, metadata={"help": "Run folder (outputs/eval-MODEL)."})
    score_only: bool = field(default=False, metadata={"help": "Generate nothing: score again what is stored."})
    page_answers: int = field(default=5000, metadata={"help": "Generations on the page at most."})
    judge_url: str | None = field(default=None, metadata={"help": "OpenAI-compatible endpoint."})
    judge_model: str | None = field(default=None, metadata={"help": "The endpoint's model."})
    judge_when: str = field(default="wrong", metadata={"help": "wrong: where the rules found no right answer; all."})
    judge_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "Environment variable with the key."})
    judge_timeout: float = field(default=60.0, metadata={"help": "Seconds an answer of the judge may take."})
    judge_retries: int = field(default=4, metadata={"help": "How often a failed request to the judge is repeated."})
    judge_workers: int = field(default=8, metadata={"help": "Requests to the judge at a time."})
    harness: str = field(default="sapo-trl", metadata={"help": "sapo-trl or lmms-eval."})
    harness_python: str | None = field(default=None, metadata={"help": "Python of lmms-eval's environment."})
    harness_model: str | None = field(default=None, metadata={"help": "lmms-eval's name for the kind of model."})

    def __post_init__(self):
        if not self.model and not (self.score_only and self.output_dir):
            raise ValueError("`model` is not set: 'embedded', a folder or a hub id.")
        self.benchmarks = [name for entry in self.benchmarks for name in entry.split(",") if name]
        _among("backend", self.backend, BACKENDS)
        _among("harness", self.harness, HARNESSES)
        _among("judge_when", self.judge_when, JUDGE_WHEN)
        _among("dtype", self.dtype, ("auto", "bfloat16", "float16", "float32"))
        for name in ("max_new_tokens", "n", "limit", "batch_size", "judge_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("temperature", "judge_retries", "page_answers"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1], got {self.top_p}.")
        if self.judge_timeout <= 0:
            raise ValueError(f"`judge_timeout` must be positive, got {self.judge_timeout}.")
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
        """The settings that decide what is generated."""
        settings = asdict(self)
        return {name: settings[name] for name in IDENTITY}


def chosen_benchmarks(entries: Iterable[str], known: Iterable[str]) -> dict[str, str | None]:
    """
    Names and local paths of `benchmarks`.

    Args:
        entries (`Iterable[str]`): each `NAME` or `NAME=PATH`.
        known (`Iterable[str]`): the names there are.

    Returns:
        `dict[str, str | None]`: path by name, `None` for the published data set.

    Raises:
        ValueError: for no name, an unknown one, one that occurs twice, or a path that does not exist.
    """
    known = list(known)
    chosen: dict[str, str | None] = {}
    for entry in entries:
        name, has_path, path = entry.partition("=")
        if name not in known:
            raise ValueError(f"benchmarks: {name!r} is none of {', '.join(known)}.{nearest_name(name, known)}")
        if name in chosen:
            raise ValueError(f"benchmarks: {name!r} is there twice.")
        if has_path and not os.path.exists(path):
            raise ValueError(f"benchmarks: {entry!r} names the path {path!r}, where there is nothing.")
        chosen[name] = path if has_path else None
    if not chosen:
        raise ValueError(f"`benchmarks` is empty: name some of {', '.join(known)}.")
    return chosen


def _among(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.{nearest_name(value, known)}")
