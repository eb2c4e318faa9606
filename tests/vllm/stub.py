"""A small HTTP server that answers as vLLM does, with a transformers model and faults to order."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel


class StubServer:
    """
    Samples text with `model`, or with what it is told to load; of prompts with images it answers `7, 8, 9`.

    Args:
        model ([`~transformers.PreTrainedModel`], *optional*): what it starts with.
        port (`int`): 0 for a free one.
    """

    def __init__(self, model: PreTrainedModel | None = None, port: int = 0):
        self.first_model = self.model = model
        self.weight_version = "default"
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()
        # Faults.
        self.without: set[str] = set()
        """Paths that are not found."""
        self.statuses: list[int] = []
        """Of the next requests for responses."""
        self.broken_connections = 0
        """So many requests for responses are not answered."""
        self.forgets_at: set[int] = set()
        """Numbers of requests for responses before which it is as after a restart."""
        self.is_busy = 0
        """So many times the prefix cache is kept."""
        self.raw_logprobs = False
        self.pads_per_image = 4
        self.finish_reason = "length"
        self.image_token_id = -1
        self.held_from = 10**9
        """Requests for responses from this number on are answered when `release` is set."""
        self.release = threading.Event()
        self.asked_of: list[tuple[str, list[int]]] = []
        """The name of the weights and the prompt of each request for responses."""
        self.http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    def stop(self) -> None:
        self.release.set()
        self.http.shutdown()
        self.http.server_close()

    def sent_to(self, path: str) -> list[dict[str, Any]]:
        """Bodies of the requests, without the client's first look at the server."""
        return [body for at, body in self.requests if at == path and body.get("max_tokens") != 1]

    def respond(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a request; raises `LookupError` for a path that is not there."""
        if path in self.without:
            raise LookupError(path)
        if path == "/health":
            return None
        if path == "/weight_info":
            return {"weight_version": self.weight_version}
        if path == "/v1/models":
            return {"data": [{"id": "stub"}]}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            folder = Path(body["kwargs"]["weights_path"])
            assert folder.is_absolute()
            self.model = type(self.first_model).from_pretrained(folder)
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            self.is_busy -= 1
            return {"success": self.is_busy < 0}
        if path == "/reset_encoder_cache":
            return None
        if path == "/update_weight_version":
            self.weight_version = body["new_version"]
            return {"success": True}
        if path == "/v1/completions":
            rows = [self._sample(body, index) for index in range(body.get("n", 1))]
            return {
                "choices": [
                    {"index": i, "token_ids": ids, "logprobs": {"token_logprobs": logps}, "finish_reason": reason}
                    for i, (ids, logps, reason) in reversed(list(enumerate(rows)))
                ]
            }
        if path == "/inference/v1/generate":
            expanded = []
            for token in body["token_ids"]:
                expanded += [token] * (self.pads_per_image if token == self.image_token_id else 1)
            content = [{"token": f"token_id:{token}", "logprob": -1.0} for token in (7, 8, 9)]
            choice = {"token_ids": [7, 8, 9], "logprobs": {"content": content}, "finish_reason": "length"}
            n = body["sampling_params"]["n"]
            return {"prompt_token_ids": expanded, "choices": [{"index": i, **choice} for i in range(n)]}
        raise LookupError(path)

    @torch.no_grad()
    def _sample(self, body: dict[str, Any], index: int) -> tuple[list[int], list[float], str]:
        generator = torch.Generator().manual_seed(body.get("seed", 0) + index)
        ids, logps = list(body["prompt"]), []
        while len(logps) < body["max_tokens"]:
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            raw = logits.log_softmax(-1)
            logprobs = (logits / body["temperature"]).log_softmax(-1)
            if body["top_p"] < 1e-3:
                logprobs = torch.full_like(logprobs, -torch.inf).index_fill(0, logprobs.argmax(), 0.0)
            token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
            logps.append((raw if self.raw_logprobs else logprobs)[token].item())
            ids.append(token)
            if token in body.get("stop_token_ids", []):
                return ids[-len(logps) :], logps, "stop"
        return ids[-len(logps) :], logps, self.finish_reason

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer({})

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.answer(json.loads(body) if body else {})

            def answer(self, body: dict[str, Any]) -> None:
                if self.path in ("/v1/completions", "/inference/v1/generate") and body.get("max_tokens") != 1:
                    with stub.lock:
                        stub.asked_of.append((stub.weight_version, body.get("prompt") or body["token_ids"]))
                        is_held = len(stub.asked_of) >= stub.held_from
                    if is_held:
                        stub.release.wait(300)
                # One at a time, so that what is ordered happens in order.
                with stub.lock:
                    stub.requests.append((self.path, body))
                    if self.path in ("/v1/completions", "/inference/v1/generate") and body.get("max_tokens") != 1:
                        if len(stub.sent_to(self.path)) in stub.forgets_at:
                            stub.weight_version, stub.model = "default", stub.first_model
                        if stub.broken_connections > 0:
                            stub.broken_connections -= 1
                            self.close_connection = True
                            return
                        if stub.statuses:
                            self.write(stub.statuses.pop(0), {"error": {"message": "as ordered"}})
                            return
                    try:
                        status, answer = 200, stub.respond(self.path, body)
                    except LookupError:
                        status, answer = 404, {"error": {"message": "Not Found"}}
                self.write(status, answer)

            def write(self, status: int, answer: Any) -> None:
                content = b"" if answer is None else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


@contextlib.contextmanager
def stub_server(model: PreTrainedModel | None = None, port: int = 0) -> Iterator[StubServer]:
    server = StubServer(model, port)
    try:
        yield server
    finally:
        with contextlib.suppress(OSError):
            server.stop()
