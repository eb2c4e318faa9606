"""Generation with transformers, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import create_model_from_path

from ...embedded import load_processor
from ...generation.model_settings import own_settings_ignored
from ...generation.prompt_learning import let_peft_find_the_cache
from ..settings import EvalArguments
from . import Generation, Request, plain_messages, texts_to_continue


class SeededChoice(LogitsProcessor):
    """
    Samples each row with its own random numbers, and masks all other tokens.

    `generate` draws from one generator for a whole batch, so a row's text would depend on the other rows. Here row `b`
    takes at step `t` the first token with a cumulative probability above `uniforms[b, t]`. Greedy decoding then gives
    a sample of the warped distribution, and the same sample in every batch.

    Args:
        uniforms (`torch.Tensor`): float64 `(B, max_new_tokens)` in [0, 1).
        prompt_length (`int`): number of tokens before the first generated token, including padding.
    """

    def __init__(self, uniforms: torch.Tensor, prompt_length: int):
        self.uniforms = uniforms
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # Use float64: rounding errors of 150,000 summed float32 would make unlikely tokens likelier or impossible.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        threshold = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def row_uniforms(seeds: Sequence[int], length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """float64 `(B, length)` in [0, 1): random numbers from each seed, the same on every device."""
    # Draw float32 numbers. The largest is so far below 1 that its product with a sum of 1 does not round up to 1.
    rows = [np.random.default_rng(seed).random(length, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows)).double().to(device)


class TransformersBackend:
    """
    Generates with a transformers model.

    Each row of a batch has its own random numbers. So the same seed gives the same text in another batch, apart from
    rounding errors of the logits. Padding changes the logits' last digits. This rarely moves a choice to the next
    token (about once in 10^5 tokens in float32, more often in bfloat16).

    Args:
        arguments ([`EvalArguments`]): model and sampling.
    """

    def __init__(self, arguments: EvalArguments):
        kwargs = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
        self.processing_class = load_processor(arguments.model, **kwargs)
        # TRL reads the architecture from the configuration: an image-text-to-text model or a text model.
        model = create_model_from_path(arguments.model, dtype=arguments.dtype, use_safetensors=True, **kwargs)
        if arguments.adapter:
            model = PeftModel.from_pretrained(model, arguments.adapter)
            let_peft_find_the_cache(model)
        self.model = model.eval()
        if model.device.type == "cpu" and PartialState().device.type != "cpu":
            self.model.to(PartialState().device)
        self.template_kwargs = arguments.chat_template_kwargs or {}
        self.temperature = arguments.temperature
        self.top_p = arguments.top_p
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        end = model.generation_config.eos_token_id
        end = tokenizer.eos_token_id if end is None else end
        self.end_ids = set(end if isinstance(end, list) else [end])
        # Decode greedily, because `SeededChoice` leaves only one token.
        self.generation_config = GenerationConfig(
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(self.end_ids),
        )

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """See [`Backend`]."""
        inputs = self._encode(requests).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        processors = LogitsProcessorList()
        if self.temperature > 0:
            uniforms = row_uniforms(
                [request.seed for request in requests], self.generation_config.max_new_tokens, self.model.device
            )
            processors += [TemperatureLogitsWarper(self.temperature)]
            processors += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
            processors += [SeededChoice(uniforms, length)]
        # Ignore the checkpoint's own settings, such as a repetition penalty: they would distort the comparison.
        with own_settings_ignored(self.model):
            sequences = self.model.generate(
                **inputs, generation_config=self.generation_config, logits_processor=processors
            )
        return [self._read(row) for row in sequences[:, length:].tolist()]

    def _encode(self, requests: Sequence[Request]) -> Any:
        """The prompts as inputs of the model's forward, padded on the left."""
        is_text_model = isinstance(self.processing_class, PreTrainedTokenizerBase)
        if is_text_model and any(request.images for request in requests):
            raise ValueError("benchmarks: a prompt has images, but `model` is a text model.")
        has_template = not is_text_model or self.tokenizer.chat_template is not None
        texts = texts_to_continue([request.prompt for request in requests], has_template)
        if texts is not None:
            return self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        if is_text_model:
            return self.tokenizer.apply_chat_template(
                [plain_messages(request.prompt) for request in requests],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
                **self.template_kwargs,
            )
        return self.processing_class.apply_chat_template(
            [prepare_multimodal_messages(request.prompt, request.images) for request in requests],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
            **self.template_kwargs,
        )

    def _read(self, ids: list[int]) -> Generation:
        """A generation from its tokens, which may have padding at the end."""
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
        tokens = len(ids) if end is None else end + 1
        text = self.tokenizer.decode(ids[:tokens], skip_special_tokens=True)
        return Generation(text, tokens, "length" if end is None else "stop")
