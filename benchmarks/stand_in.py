"""
A stand-in for a vLLM server, in a process of its own: the endpoints that `VLLMServerRollout` uses, over real HTTP.

It samples from a transformers model, all waiting prompts in one batch, or it returns the same tokens every time. With
`--seconds` it answers that long after a request; the time of sampling is included.

    python benchmarks/stand_in.py --tokens 8
    python benchmarks/stand_in.py --model folder

It prints its address in its first line.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


GATHER_SECONDS = 0.05
"""Time in which prompts come together into one batch."""

Sampled = tuple[list[list[int]], list[list[float]]]
"""Token ids and log-probabilities of the responses to a prompt."""


class FixedTokens:
    """Answers any prompt with the same tokens."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def load(self, folder: str) -> None:
        """Weights make no difference."""

    def sample(self, bodies: list[dict[str, Any]]) -> list[tuple[list[int], Sampled]]:
        # 28, 29, … are neither special tokens nor images' in the tokenizers of this package.
        ids, logps = list(range(28, 28 + self.tokens)), [-1.0] * self.tokens
        return [(body["prompt"], ([ids] * body["n"], [logps] * body["n"])) for body in bodies]


class Model:
    """
    Samples from a transformers model with pictures.

    Args:
        folder (`str`): model and processor.
    """

    def __init__(self, folder: str):
        from sapo_trl.embedded import load_processor

        self.processor = load_processor(folder)
        self.load(folder)

    def load(self, folder: str) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()

    def sample(self, bodies: list[dict[str, Any]]) -> list[tuple[list[int], Sampled]]:
        import torch
        from PIL import Image
        from transformers import GenerationConfig

        tokenizer, images, texts = self.processor.tokenizer, [], []
        for body in bodies:
            parts = [part["url"].partition(",")[2] for part in body["content_parts"]]
            images.append([Image.open(io.BytesIO(base64.b64decode(part))) for part in parts])
            texts.append(tokenizer.decode(body["token_ids"]))
        inputs = self.processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left")
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        settings = bodies[0]["sampling_params"]
        config = GenerationConfig(
            do_sample=True,
            temperature=settings["temperature"],
            top_k=0,
            num_return_sequences=settings["n"],
            max_new_tokens=settings["max_tokens"],
            eos_token_id=settings["stop_token_ids"],
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        torch.manual_seed(settings["seed"])
        with torch.no_grad():
            output = self.model.generate(**inputs, generation_config=config)
        completions = output.sequences[:, inputs["input_ids"].size(1) :]
        logits = torch.stack(output.logits, dim=1).float() / settings["temperature"]
        logps = logits.log_softmax(-1).gather(2, completions[..., None])[..., 0]
        answers, ends = [], set(settings["stop_token_ids"])
        for row, prompt in enumerate(prompts):
            rows = range(row * settings["n"], (row + 1) * settings["n"])
            lengths = [self._length(completions[r].tolist(), ends) for r in rows]
            ids = [completions[r, :length].tolist() for r, length in zip(rows, lengths, strict=True)]
            answers.append((prompt, (ids, [logps[r, : len(x)].tolist() for r, x in zip(rows, ids, strict=True)])))
        return answers

    @staticmethod
    def _length(ids: list[int], ends: set[int]) -> int:
        return next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))


class StandIn:
    """
    The server.

    Args:
        backend ([`FixedTokens`] or [`Model`]): samples.
        seconds (`float`): time until a request for responses is answered.
    """

    def __init__(self, backend: FixedTokens | Model, seconds: float):
        self.backend, self.seconds, self.version = backend, seconds, "default"
        self._waiting: queue.Queue[tuple[dict[str, Any], queue.Queue]] = queue.Queue()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            batch = [self._waiting.get()]
            time.sleep(GATHER_SECONDS)
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._waiting.get_nowait())
            # Prompts arrive in any order. In an order of their own they get the same samples in every run.
            batch.sort(key=lambda item: json.dumps(item[0], sort_keys=True))
            for (_, answer), found in zip(batch, self.backend.sample([body for body, _ in batch]), strict=True):
                answer.put(found)

    def respond(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/health" or path == "/reset_encoder_cache":
            return None
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/v1/models":
            return {"data": [{"id": "stand-in"}]}
        if path == "/collective_rpc":
            self.backend.load(body["kwargs"]["weights_path"])
            return {"results": [None]}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path in ("/reset_prefix_cache", "/update_weight_version"):
            return {"success": True}
        if path == "/v1/completions" and body["max_tokens"] == 1:  # the client's look at the log-probabilities
            choice = {"index": 0, "token_ids": [0], "logprobs": {"token_logprobs": [0.0]}, "finish_reason": "length"}
            return {"choices": [choice]}
        started, answer = time.monotonic(), queue.Queue()
        self._waiting.put((body, answer))
        prompt, (ids, logps) = answer.get()
        time.sleep(max(0.0, self.seconds - (time.monotonic() - started)))
        choices = [
            {"index": i, "token_ids": row, "logprobs": self._logprobs(path, of_row), "finish_reason": "stop"}
            for i, (row, of_row) in enumerate(zip(ids, logps, strict=True))
        ]
        return {"prompt_token_ids": prompt, "choices": choices}

    @staticmethod
    def _logprobs(path: str, logps: list[float]) -> dict[str, Any]:
        if path == "/v1/completions":
            return {"token_logprobs": logps}
        return {"content": [{"logprob": logp} for logp in logps]}


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer(json.loads(body) if body else {})

    def answer(self, body: dict[str, Any]) -> None:
        answer = self.server.stand_in.respond(self.path, body)
        content = b"" if answer is None else json.dumps(answer).encode()
        with contextlib.suppress(ConnectionError):  # a client that has gone
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[str]:
    """A stand-in in a process of its own, with these arguments. Its address is the context's value."""
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model with pictures, and its processor")
    parser.add_argument("--tokens", type=int, default=8, help="length of a response without a model")
    parser.add_argument("--seconds", type=float, default=0.0, help="time until a request is answered")
    options = parser.parse_args()
    backend = Model(options.model) if options.model else FixedTokens(options.tokens)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.stand_in = StandIn(backend, options.seconds)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
