"""vLLM servers as processes of their own, on tiny models with random weights."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

from tests.testing_utils import Family


NEEDS_VLLM = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm`"),
]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
"""Of every engine: one GiB for keys and values, and no network."""
IN_SYNC = 2e-3
"""Mean absolute difference of log-probabilities; measured 2e-7 to 5e-7 in sync and 1.4 one step behind."""


def build_text_model(family: Family) -> Qwen2ForCausalLM:
    """Larger than the other tests' in one thing: heads of 32 channels, the fewest that vLLM knows."""
    config = family.config(family.tokenizer).to_dict()
    del config["layer_types"]
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"initializer_range": 0.1, "max_position_embeddings": 512}
    set_seed(0)
    return Qwen2ForCausalLM(Qwen2Config.from_dict(config))


def save_for_vllm(model, processing_class, folder: Path) -> Path:
    """Model and processor as a folder to start a server from."""
    model.save_pretrained(folder)
    processing_class.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """A vLLM server; `folder` is what it starts from, and its log lies beside that."""

    folder: Path
    port: int
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.folder.with_suffix(".log").read_text()

    def start(self) -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
            **ENVIRONMENT,
            "VLLM_SERVER_DEV_MODE": "1",
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        command += ["--port", str(self.port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256"]
        command += ["--max-num-seqs", "16", "--enforce-eager"]
        command += ["--logprobs-mode", "processed_logprobs", "--enable-scale-out"]
        with open(self.folder.with_suffix(".log"), "a") as log:
            # A session of its own: the server starts further processes, which are to die with it.
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self) -> None:
        """As a machine that goes away does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    server = Server(folder, free_port())
    server.start()
    try:
        yield server
    finally:
        server.kill()
