"""
Responses from a plain vLLM server, on this machine or another, without NCCL.

Weights are passed through a folder that both the trainer and the server can read. Prompts and responses are sent as
token ids.
"""

from __future__ import annotations

import base64
import io
import itertools
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from transformers import ProcessorMixin
from trl import is_conversational, prepare_multimodal_messages

from ..http_client import MAX_ANSWER_BYTES, HTTPClient, RequestRefusedError, ServerLostError
from .ahead import InFlight
from .policy_weights import remove_others, save_policy, version_of_policy


logger = logging.getLogger(__name__)

MAX_CONCURRENT_REQUESTS = 64
"""Largest number of prompts that one process sends at a time. The server decides how to batch them."""

_HOW_TO_START = (
    "Start one with\n\n    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model <the policy> "
    "--logprobs-mode processed_logprobs --enable-scale-out\n\nand see docs/vllm.md."
)

TOKEN_BYTES = 1024
"""Largest size of an answer per token: ids, log-probabilities and text."""

T = TypeVar("T")


class SamplerError(RuntimeError):
    """The sampler refused a request, or its answer contradicts the request."""


class SamplerLostError(SamplerError):
    """The sampler did not answer, even after retries."""


class _SamplerClient(HTTPClient):
    """An HTTP client that raises the sampler's errors."""

    def request(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().request(*args, **kwargs)
        except ServerLostError as error:
            raise SamplerLostError(str(error)) from error
        except RequestRefusedError as error:
            raise SamplerError(str(error)) from error


@contextmanager
def _answer_to(path: str) -> Iterator[None]:
    """A context for reading an answer. If a part of it is missing, it raises a [`SamplerError`]."""
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        raise SamplerError(
            f"The answer of {path} is not in vLLM's form ({type(error).__name__}: {error}). Is it a vLLM server?"
        ) from error


@dataclass
class _Request:
    """
    A prompt and the number of responses to it.

    `collapsed_ids` are the prompt's ids with one placeholder for each image. The server expects this form.
    """

    prompt_ids: list[int]
    n: int
    images: list[Image.Image] = field(default_factory=list)
    collapsed_ids: list[int] = field(default_factory=list)


@dataclass
class _Answer:
    """Responses to one prompt. `complete` is `False` if the server could not finish a response."""

    completion_ids: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float | None]] = field(default_factory=list)
    complete: bool = True


@dataclass
class RequestedRollout:
    """
    A rollout that the server samples while the trainer does something else.

    Args:
        sampled_at (`int`): optimizer steps behind the weights that sample it.
    """

    sampled_at: int
    _requests: list[_Request]
    _in_flight: InFlight[tuple[list[_Answer], bool]]
    _accelerator: Accelerator

    def collect(self) -> dict[str, list] | None:
        """
        Wait for the responses. All processes must call this method.

        Returns:
            `dict`, *optional*: as [`VLLMServerRollout`] returns it; `None` if the server lost the weights or gave up
            requests, so that the rollout must be requested again.

        Raises:
            The exception that ended the request, on the process where it was raised, and a [`SamplerError`] of the
            same kind on the others.
        """
        answers, valid = _on_all(self._accelerator, self._in_flight.result)
        return _output(self._requests, answers) if valid else None

    def abandon(self) -> None:
        """Give the rollout up. Its requests end at once."""
        self._in_flight.abandon()


class VLLMServerRollout:
    """
    A `rollout_func` for [`SAPOTrainer`] and [`~trl.GRPOTrainer`] that samples from a vLLM server.

    Before a rollout, if the policy has changed, the policy (never the critic) is written to a folder, and the server
    is told to load it. The server reports the name of its weights. If it was restarted in between, the name differs,
    and its responses are discarded and sampled again. Consecutive equal prompts are sent once, together with the
    number of responses.

    Prompts with images are also sent as token ids. The server expands the image placeholders itself. The expanded
    prompt must equal the trainer's prompt, token for token.

    With several processes, each process sends its own prompts. Only the main process writes and loads weights, while
    the other processes wait. If one process fails, all fail.

    With `rollouts_ahead=1` the trainer calls [`VLLMServerRollout.request`] instead. The server then samples the next
    rollout while the trainer updates the policy on the present one.

    Args:
        base_url (`str`): address of the server, such as `"http://localhost:8000"`.
        weights_dir (`str` or `Path`):
            Folder for the policy's weights. Only this run may use it, and the server must see it under the same path.
            It holds one copy of the policy, or two while a new copy is written.
        timeout (`float`, *optional*, defaults to 600):
            Seconds from the beginning of one request to the end of its answer.
        retries (`int`, *optional*, defaults to 5):
            Largest number of repetitions of a failed request. They follow after 1, 2, 4, … times `backoff` seconds, or
            after the seconds that the server names, at most 30.
        backoff (`float`, *optional*, defaults to 1):
            Seconds before the first repetition.
        start_timeout (`float`, *optional*, defaults to 0):
            Seconds to wait for a server that is still starting.
        seeded (`bool`, *optional*, defaults to `True`):
            Seed each prompt's sampling from `args.seed`, the step and the prompt's position, so that a run can be
            repeated and resumed. Seeds make servers sample somewhat slower.

    Raises:
        [`SamplerLostError`]: if no server answers at `base_url`, or the server stops answering during a rollout.
        [`SamplerError`]: if the server lacks a required feature, or refuses a request.

    Example:

    ```python
    rollout = VLLMServerRollout("http://localhost:8000", "outputs/sapo/policy-for-vllm")
    trainer = SAPOTrainer(..., rollout_func=rollout)
    train_with_checkpoint(trainer)
    ```
    """

    def __init__(
        self,
        base_url: str,
        weights_dir: str | Path,
        *,
        timeout: float = 600.0,
        retries: int = 5,
        backoff: float = 1.0,
        start_timeout: float = 0.0,
        seeded: bool = True,
    ):
        self.client = _SamplerClient(base_url, timeout, retries, backoff, is_nearby=True)
        # The path must be absolute, because the server has another working directory.
        self.weights_dir = Path(weights_dir).resolve()
        self.seeded = seeded
        self.weights: str | None = None
        self._written_in: Any = None
        self._written: tuple | None = None
        self._calls: tuple[tuple[str, int], int] = (("", -1), 0)
        self._in_flight: InFlight | None = None
        self._wait_for_server(start_timeout)
        self.model = self._check_server()

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list]:
        """
        Sample a response to each prompt.

        Args:
            prompts (`list`): conversations (with PIL images in their content blocks, if any) or texts.
            trainer ([`~trl.GRPOTrainer`]): the trainer with the policy, the processing class and the settings.

        Returns:
            `dict` of lists with one entry per prompt: `prompt_ids` (`list[list[int]]`, with expanded image
            placeholders), `completion_ids` (`list[list[int]]`), `logprobs` (`list[list[float]]`, the sampler's
            log-probabilities, one per completion token, with `None` instead of NaN).
        """
        _check_supported(trainer)
        self._wait_for_rollout_ahead()
        accelerator = trainer.accelerator
        requests = _requests(prompts, trainer)
        mode = "train" if trainer.model.training else "eval"
        sampling = self._sampling_of(requests, trainer, self._place(mode, trainer.state.global_step))
        for _ in range(self.client.retries + 1):
            self._sync_weights(trainer)
            answers, valid = _on_all(accelerator, lambda: self._respond_to_all(requests, sampling))
            if valid:
                return _output(requests, answers)
            logger.warning(
                "The vLLM server at %s lost the policy's weights or gave up requests during a rollout. Perhaps it was "
                "restarted. It gets the weights once more, and the rollout is repeated.",
                self.client.base_url,
            )
        raise SamplerLostError(
            f"The vLLM server at {self.client.base_url} lost the policy's weights or gave up requests in "
            f"{self.client.retries + 1} rollouts in a row. Does it crash and start again, or does another run use it? "
            "A server can serve one run at a time. Mend that and resume from the last checkpoint."
        )

    def request(self, prompts: list[Any], trainer: Any, step: int) -> RequestedRollout:
        """
        Give the server the current policy, and have it sample a response to each prompt in the background. All
        processes must call this method.

        The server gets no other weights before it has finished: any other rollout waits for this one.

        Args:
            prompts (`list`): conversations (with PIL images in their content blocks, if any) or texts.
            trainer ([`~trl.GRPOTrainer`]): the trainer with the policy, the processing class and the settings.
            step (`int`): optimizer step before which the responses are needed. The seeds follow from it.

        Returns:
            [`RequestedRollout`]
        """
        _check_supported(trainer)
        self._wait_for_rollout_ahead()
        # Tokenizers must not be used by two threads at a time, and weights change while the trainer goes on.
        requests = _requests(prompts, trainer)
        sampling = self._sampling_of(requests, trainer, f"train {step} 0")
        self._write_weights(trainer)
        is_alone = trainer.accelerator.num_processes == 1
        if not is_alone:  # the others must not ask before the main process has loaded the weights
            self._load_on_main(trainer.accelerator)

        def sample(stop: threading.Event) -> tuple[list[_Answer], bool]:
            if is_alone:
                self._load_weights(stop)
            return self._respond_to_all(requests, sampling, stop)

        self._in_flight = InFlight(sample)
        return RequestedRollout(trainer.state.global_step, requests, self._in_flight, trainer.accelerator)

    def _wait_for_rollout_ahead(self) -> None:
        """Until then the server needs its weights. Errors are for the caller of [`RequestedRollout.collect`]."""
        if self._in_flight is not None:
            self._in_flight.wait()
            self._in_flight = None

    # ---------------------------------------------------------------------------------------------- the server

    def _wait_for_server(self, start_timeout: float) -> None:
        deadline = time.monotonic() + start_timeout
        while True:
            try:
                self.client.get("/health", retries=0)
                return
            except SamplerError as error:
                if time.monotonic() >= deadline:
                    raise SamplerLostError(
                        f"No vLLM server is ready at {self.client.base_url} ({error}). {_HOW_TO_START}"
                    ) from error
                time.sleep(min(2.0, max(0.0, deadline - time.monotonic())))

    def _check_server(self) -> str:
        """Check that the server has all required features. Returns the name of its model."""
        try:
            self.client.get("/weight_info")
        except SamplerLostError:
            raise
        except SamplerError as error:
            raise SamplerError(
                f"The server at {self.client.base_url} has no endpoints to change its weights ({error}). It needs "
                f"vLLM 0.31 or 0.32 and the environment variable VLLM_SERVER_DEV_MODE=1. {_HOW_TO_START}"
            ) from error
        with _answer_to("/v1/models"):
            model = self.client.get("/v1/models")["data"][0]["id"]
        # With so small a `top_p` only the most probable token is left, so the sampling distribution gives it
        # probability 1.
        probe = {"model": model, "prompt": [0], "max_tokens": 1, "logprobs": 0, "temperature": 1.0, "top_p": 1e-6}
        with _answer_to("/v1/completions"):
            logprob = float(self.client.post("/v1/completions", probe)["choices"][0]["logprobs"]["token_logprobs"][0])
        if abs(logprob) > 1e-4:
            raise SamplerError(
                f"The server at {self.client.base_url} returns log-probabilities from before temperature and "
                "truncation. The importance correction needs log-probabilities of the sampling distribution. Start "
                "the server with `--logprobs-mode processed_logprobs`."
            )
        return model

    def _has_weights(self, stop: threading.Event | None = None) -> bool:
        # A restarted server has its initial weights, under another name.
        with _answer_to("/weight_info"):
            return self.client.get("/weight_info", stop=stop)["weight_version"] == self.weights

    def _sync_weights(self, trainer: Any) -> None:
        """Give the server the current policy, unless the server has it already."""
        self._write_weights(trainer)
        self._load_on_main(trainer.accelerator)

    def _write_weights(self, trainer: Any) -> None:
        """Write the current policy to its folder, unless it is there already."""
        # Each call of `train` has a state of its own, and counts its steps from 0.
        is_written = self._written_in is trainer.state and self._written == version_of_policy(trainer)
        if not all(gather_object([is_written])):
            name = f"policy-step-{trainer.state.global_step}-{secrets.token_hex(4)}"
            name = broadcast_object_list([name])[0]
            _on_all(trainer.accelerator, lambda: (save_policy(trainer, self.weights_dir, name), True))
            # Afterwards: merging an adapter changes the weights, and then restores them.
            self.weights, self._written_in, self._written = name, trainer.state, version_of_policy(trainer)

    def _load_on_main(self, accelerator: Accelerator) -> None:
        _on_all(accelerator, lambda: (self._load_weights() if accelerator.is_main_process else None, True))

    def _load_weights(self, stop: threading.Event | None = None) -> None:
        if self._has_weights(stop):
            return
        payload = {"method": "reload_weights", "kwargs": {"weights_path": str(self.weights_dir / self.weights)}}
        self.client.post("/collective_rpc", payload, stop=stop)
        # Reset the results of the old weights: keys and values of prompts, and embeddings of images. When vLLM 0.31
        # loads weights, it forgets only the embeddings' tensors. It would then crash at the next known picture.
        self._reset_prefix_cache(stop)
        self.client.post("/reset_encoder_cache", stop=stop)
        self.client.post("/update_weight_version", {"new_version": self.weights}, stop=stop)
        remove_others(self.weights_dir, self.weights)

    def _reset_prefix_cache(self, stop: threading.Event | None) -> None:
        for attempt in range(self.client.retries + 1):
            with _answer_to("/reset_prefix_cache"):
                if self.client.post("/reset_prefix_cache", stop=stop)["success"]:
                    return
            delay = self.client.backoff * 2**attempt
            if stop is None:
                time.sleep(delay)
            else:  # if it is set meanwhile, the next request ends at once
                stop.wait(delay)
        raise SamplerError(
            f"The vLLM server at {self.client.base_url} is busy and keeps its prefix cache, which belongs to older "
            "weights. Does another run use the server? A server can serve only one run at a time."
        )

    def _respond_to_all(
        self, requests: list[_Request], sampling: list[dict[str, Any]], stop: threading.Event | None = None
    ) -> tuple[list[_Answer], bool]:
        """This process's responses, and whether all are complete and come from the right weights."""
        stop = threading.Event() if stop is None else stop
        with ThreadPoolExecutor(max_workers=min(MAX_CONCURRENT_REQUESTS, len(requests))) as executor:
            pairs = zip(requests, sampling, strict=True)
            futures = [executor.submit(self._respond, request, settings, stop) for request, settings in pairs]
            try:
                answers = [future.result() for future in futures]
            except BaseException:
                # Every waiting request would also be repeated in vain.
                stop.set()
                executor.shutdown(wait=False, cancel_futures=True)
                raise
        return answers, all(answer.complete for answer in answers) and self._has_weights(stop)

    def _respond(self, request: _Request, sampling: dict[str, Any], stop: threading.Event) -> _Answer:
        path = "/inference/v1/generate" if request.images else "/v1/completions"
        tokens = sampling["n"] * (len(request.prompt_ids) + sampling["max_tokens"])
        max_bytes = MAX_ANSWER_BYTES + TOKEN_BYTES * tokens
        with _answer_to(path):
            if request.images:
                choices = self._choices_for_images(path, request, sampling, max_bytes, stop)
            else:
                payload = {"model": self.model, "prompt": request.prompt_ids, "return_token_ids": True, **sampling}
                choices = self.client.post(path, payload, max_bytes=max_bytes, stop=stop)["choices"]
            return self._read_choices(request, choices)

    def _read_choices(self, request: _Request, choices: list[dict[str, Any]]) -> _Answer:
        if len(choices) != request.n:
            raise SamplerError(f"The vLLM server returned {len(choices)} responses, but {request.n} were requested.")
        answer = _Answer()
        for choice in sorted(choices, key=lambda choice: choice["index"]):
            logprobs = choice["logprobs"]
            logprobs = [t["logprob"] for t in logprobs["content"]] if request.images else logprobs["token_logprobs"]
            if not all(isinstance(token, int) for token in choice["token_ids"]):
                raise TypeError(f"`token_ids` must be integers, got {choice['token_ids'][:5]!r}")
            # A stopped server returns incomplete responses.
            answer.complete &= choice["finish_reason"] in ("stop", "length") and len(choice["token_ids"]) > 0
            if len(logprobs) != len(choice["token_ids"]):
                raise SamplerError(
                    f"The vLLM server returned {len(choice['token_ids'])} tokens and {len(logprobs)} "
                    "log-probabilities for a response."
                )
            answer.completion_ids.append(choice["token_ids"])
            answer.logprobs.append(logprobs)
        return answer

    def _choices_for_images(
        self, path: str, request: _Request, sampling: dict[str, Any], max_bytes: int, stop: threading.Event
    ) -> list[dict[str, Any]]:
        payload = {
            "model": self.model,
            "token_ids": request.collapsed_ids,
            "content_parts": [{"type": "image_url", "url": _data_url(image)} for image in request.images],
            "return_token_ids": True,
            "sampling_params": sampling,
        }
        try:
            answer = self.client.post(path, payload, max_bytes=max_bytes, stop=stop)
        except SamplerLostError:
            raise
        except SamplerError as error:
            raise SamplerError(
                f"{error}\nPrompts with images need a server that was started with `--enable-scale-out`, and a model "
                "for images."
            ) from error
        if answer["prompt_token_ids"] != request.prompt_ids:
            raise SamplerError(
                f"A prompt with {len(request.images)} image(s) has {len(answer['prompt_token_ids'])} tokens in the "
                f"vLLM server and {len(request.prompt_ids)} in the trainer, or the tokens differ. The server would "
                "answer another prompt than the trained prompt. Its image processor has other settings (such as the "
                "limits of pixels), or it places this model's images in another way. Start the server from the folder "
                "of the trainer's model and processor."
            )
        return answer["choices"]

    # -------------------------------------------------------------------------------------------- the settings

    def _sampling_of(self, requests: list[_Request], trainer: Any, place: str) -> list[dict[str, Any]]:
        """The sampling parameters of each request. All are given, so that the server takes none from its model."""
        args = trainer.args
        sampling = {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k or 0,
            "min_p": args.min_p or 0.0,
            "repetition_penalty": args.repetition_penalty,
            "max_tokens": args.max_completion_length,
            "stop_token_ids": list(trainer.eos_token_ids),
        }
        generator = random.Random(f"{args.seed} {place} {trainer.accelerator.process_index}")
        seeds = [{"seed": generator.getrandbits(31)} if self.seeded else {} for _ in requests]
        kwargs = args.generation_kwargs or {}
        return [
            {**sampling, **seed, **kwargs, "n": request.n, "logprobs": 0}
            for request, seed in zip(requests, seeds, strict=True)
        ]

    def _place(self, mode: str, step: int) -> str:
        """A rollout's place in the run. Its seeds follow from it, and not from earlier sampling."""
        moment, calls = self._calls
        # There may be several rollouts between two optimizer steps.
        calls = calls + 1 if moment == (mode, step) else 0
        self._calls = ((mode, step), calls)
        return f"{mode} {step} {calls}"


def train_with_checkpoint(trainer: Any, **kwargs: Any) -> Any:
    """
    Train, and save a checkpoint if the vLLM server is lost.

    The checkpoint has the policy and the optimizers after the last optimizer step. Only the failed rollout must be
    repeated.

    Args:
        trainer ([`~sapo_trl.SAPOTrainer`]): a trainer with a [`VLLMServerRollout`] as `rollout_func`.
        kwargs: arguments of `trainer.train`.

    Returns:
        The result of `trainer.train`.

    Raises:
        [`SamplerLostError`]: its message names the checkpoint.
    """
    try:
        return trainer.train(**kwargs)
    except SamplerLostError as error:
        step = trainer.state.global_step
        if step == 0:
            raise
        folder = trainer.save_checkpoint()
        raise SamplerLostError(
            f"{error}\nA checkpoint of step {step} was saved in {folder}. Start the server again and resume with "
            "`resume_from_checkpoint=True`."
        ) from error


def _check_supported(trainer: Any) -> None:
    for name in ("tools", "environment_factories"):
        if getattr(trainer, name, None):
            raise ValueError(
                f"`VLLMServerRollout` samples one response to each prompt and cannot be combined with `{name}`, which "
                "needs several responses in one rollout."
            )


def _on_all(accelerator: Any, work: Callable[[], tuple[T, bool]]) -> tuple[T, bool]:
    """
    Do work on each process, and wait until all processes have finished.

    Args:
        accelerator ([`~accelerate.Accelerator`]): the accelerator of the processes.
        work (`Callable`): returns this process's result, and whether the result is good.

    Returns:
        `tuple`: this process's result, and whether the results of all processes are good.

    Raises:
        This process's error, if it has one. Otherwise, if another process has an error, a [`SamplerError`] of the same
        kind. Without it, this process would wait for the other process for ever.
    """
    result, good, error = None, False, None
    try:
        result, good = work()
    except Exception as raised:
        error = raised
    outcome = (
        good,
        isinstance(error, SamplerLostError),
        None if error is None else f"{type(error).__name__}: {error}",
    )
    outcomes = gather_object([outcome])
    if error is not None:
        raise error
    for rank, (_, lost, message) in enumerate(outcomes):
        if message is not None:
            raise (SamplerLostError if lost else SamplerError)(f"Process {rank} failed with {message}")
    return result, all(good for good, _, _ in outcomes)


def _output(requests: list[_Request], answers: list[_Answer]) -> dict[str, list]:
    """Responses in the form that TRL expects of a `rollout_func`."""
    return {
        "prompt_ids": [request.prompt_ids for request in requests for _ in range(request.n)],
        "completion_ids": [ids for answer in answers for ids in answer.completion_ids],
        "logprobs": [logps for answer in answers for logps in answer.logprobs],
    }


def _requests(prompts: list[Any], trainer: Any) -> list[_Request]:
    """One request for each run of equal prompts. Prompts are tokenized as in TRL."""
    runs = [(prompt, len(list(repeats))) for prompt, repeats in itertools.groupby(prompts)]
    counts = [count for _, count in runs]
    prompt_ids, images = _tokenize([prompt for prompt, _ in runs], trainer)
    requests = []
    for ids, n, row in zip(prompt_ids, counts, images, strict=True):
        requests.append(_Request(ids, n, row, _collapsed(ids, len(row), trainer.processing_class) if row else []))
    return requests


def _tokenize(prompts: list[Any], trainer: Any) -> tuple[list[list[int]], list[list[Image.Image]]]:
    processing_class = trainer.processing_class
    if not is_conversational({"prompt": prompts[0]}):
        return [list(ids) for ids in processing_class(text=prompts)["input_ids"]], [[] for _ in prompts]
    if isinstance(processing_class, ProcessorMixin):
        prompts = [prepare_multimodal_messages(prompt) for prompt in prompts]
    encoded = processing_class.apply_chat_template(
        conversation=prompts,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **trainer.chat_template_kwargs,
    )
    return [list(ids) for ids in encoded["input_ids"]], [_images_of(prompt) for prompt in prompts]


def _images_of(prompt: list[dict[str, Any]]) -> list[Image.Image]:
    blocks = [block for message in prompt if isinstance(message["content"], list) for block in message["content"]]
    images = [block["image"] for block in blocks if block["type"] == "image"]
    for image in images:
        if not isinstance(image, Image.Image):
            raise TypeError(f"Images of prompts must be PIL images for a vLLM server, got {type(image).__name__}.")
    return images


def _collapsed(prompt_ids: list[int], images: int, processing_class: Any) -> list[int]:
    """The ids with each run of placeholders replaced by one placeholder."""
    placeholder = getattr(processing_class, "image_token_id", None)
    collapsed = []
    for token in prompt_ids:
        if token != placeholder or not collapsed or collapsed[-1] != placeholder:
            collapsed.append(token)
    if placeholder is None or collapsed.count(placeholder) != images:
        raise SamplerError(
            f"A prompt with {images} image(s) has {collapsed.count(placeholder)} run(s) of image placeholders, but a "
            "vLLM server takes exactly one run for each image. Generate without a vLLM server."
        )
    return collapsed


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    # Convert like the trainer's image processor. vLLM would make transparent areas white.
    image.convert("RGB").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
