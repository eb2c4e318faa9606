"""Generates with the evaluation's vLLM backend, in a process of its own: an engine keeps its memory to the end."""

import json
import sys
from pathlib import Path

from PIL import Image

from sapo_trl.evaluation.backends import Request, make_backend
from sapo_trl.evaluation.settings import EvalArguments


def main(folder: Path) -> None:
    """Reads `requests.json` (messages, pictures, seeds), writes `generations.json`: sampled, in reverse, greedy."""
    content = json.loads((folder / "requests.json").read_text())
    requests = [
        Request(entry["prompt"], entry["seed"], [Image.open(folder / name) for name in entry["images"]])
        for entry in content["requests"]
    ]
    backend = make_backend(EvalArguments(model=str(folder / "model"), backend="vllm", **content["settings"]))
    runs = {"there": backend.generate(requests), "back": backend.generate(requests[::-1])[::-1]}
    backend.sampling["temperature"] = 0.0  # another engine would take another minute
    runs["greedy"] = backend.generate(requests)
    texts = {name: [vars(generation) for generation in run] for name, run in runs.items()}
    (folder / "generations.json").write_text(json.dumps(texts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
