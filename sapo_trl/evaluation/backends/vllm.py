"""Generation with a vLLM engine in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ...json_files import read_json
from ..settings import EvalArguments
from . import Generation, Request, plain_messages, texts_to_continue


MISSING = "backend='vllm' needs vLLM: pip install 'sapo_trl[vllm]'. Without it there is backend='transformers'."
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The adapter ranks that vLLM supports. An adapter needs the next rank that is large enough."""


class VLLMBackend:
    """
    Generates with vLLM. Each request has its own seed.

    vLLM decides which requests share a forward pass. With the seeds, the random numbers do not depend on that. The
    last digits of the logits still do.

    Args:
        arguments ([`EvalArguments`]): model and sampling.

    Raises:
        ModuleNotFoundError: without vLLM, with the command that installs it.
    """

    def __init__(self, arguments: EvalArguments):
        try:
            from vllm import LLM, SamplingParams
            from vllm.lora.request import LoRARequest
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "vllm":
                raise
            raise ModuleNotFoundError(MISSING, name="vllm") from error
        options: dict[str, Any] = {}
        self.adapter = None
        if arguments.adapter:
            self.adapter = LoRARequest("adapter", 1, arguments.adapter)
            options |= {"enable_lora": True, "max_lora_rank": _reserved_rank(arguments.adapter)}
        if arguments.vllm_max_model_length:
            options["max_model_len"] = arguments.vllm_max_model_length
        self.engine = LLM(
            model=arguments.model,
            revision=arguments.revision,
            tokenizer_revision=arguments.revision,
            dtype=arguments.dtype,
            seed=arguments.seed,
            trust_remote_code=arguments.trust_remote_code,
            load_format="safetensors",
            gpu_memory_utilization=arguments.vllm_gpu_memory_utilization,
            tensor_parallel_size=arguments.vllm_tensor_parallel_size,
            **options,
        )
        self.sampling = {
            "temperature": arguments.temperature,
            "top_p": arguments.top_p,
            "max_tokens": arguments.max_new_tokens,
            # vLLM's streaming detokenizer drops the bytes of a cut character. If the tokens are decoded at once, the
            # text equals the other backend's text.
            "detokenize": False,
        }
        self._sampling_params = SamplingParams
        self.tokenizer = self.engine.get_tokenizer()
        self.template_kwargs = arguments.chat_template_kwargs
        self.is_chat_model = self.tokenizer.chat_template is not None

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """See [`Backend`]."""
        sampling = [self._sampling_params(**self.sampling, seed=request.seed) for request in requests]
        options = {"sampling_params": sampling, "use_tqdm": False, "lora_request": self.adapter}
        texts = texts_to_continue([request.prompt for request in requests], self.is_chat_model)
        if texts is None:
            conversations = [_conversation(request) for request in requests]
            outputs = self.engine.chat(conversations, chat_template_kwargs=self.template_kwargs, **options)
        else:
            outputs = self.engine.generate(texts, **options)
        answers = [output.outputs[0] for output in outputs]
        texts = [self.tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
        return [
            Generation(text, len(answer.token_ids), answer.finish_reason)
            for text, answer in zip(texts, answers, strict=True)
        ]


def _conversation(request: Request) -> list[dict[str, Any]]:
    """Messages for vLLM's `chat`, with each image inside its block."""
    if not request.images:
        return plain_messages(request.prompt)
    images = iter(request.images)
    return [
        {
            **message,
            "content": message["content"]
            if isinstance(message["content"], str)
            else [
                {"type": "image_pil", "image_pil": next(images)} if block["type"] == "image" else block
                for block in message["content"]
            ],
        }
        for message in request.prompt
    ]


def _reserved_rank(adapter: str) -> int:
    """The smallest of vLLM's ranks that is large enough for an adapter."""
    rank = read_json(Path(cached_file(adapter, "adapter_config.json")), {"r": int})["r"]
    fitting = [reserved for reserved in LORA_RANKS if reserved >= rank]
    if not fitting:
        raise ValueError(f"`adapter` has rank {rank}, but vLLM takes at most {LORA_RANKS[-1]}.")
    return fitting[0]
