"""The evaluation's vLLM backend, with a real engine, against its transformers backend."""

import json
import os
import subprocess
import sys
from pathlib import Path

from sapo_trl.data import geometry_prompt
from sapo_trl.embedded import make_problems
from sapo_trl.evaluation.backends import Request
from sapo_trl.evaluation.backends.transformers import TransformersBackend
from sapo_trl.evaluation.settings import EvalArguments
from tests.testing_utils import FAMILIES

from .servers import ENVIRONMENT, NEEDS_VLLM, save_for_vllm


pytestmark = NEEDS_VLLM


def generate(folder, requests, settings):
    """The generations of `generation_backend.py`, in a process of its own."""
    entries = []
    for index, request in enumerate(requests):
        names = [f"{index}-{place}.png" for place in range(len(request.images))]
        for name, image in zip(names, request.images, strict=True):
            image.save(folder / name)
        entries.append({"prompt": request.prompt, "seed": request.seed, "images": names})
    (folder / "requests.json").write_text(json.dumps({"requests": entries, "settings": settings}))
    script = Path(__file__).with_name("generation_backend.py")
    result = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env={**os.environ, **ENVIRONMENT},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return json.loads((folder / "generations.json").read_text())


def test_samples_are_their_seeds_and_greedy_texts_those_of_transformers(qwen2_5_vl_processor, tmp_path):
    """Three prompts with a picture, one without, and the first once more by another seed."""
    family = FAMILIES["qwen2_5_vl"](qwen2_5_vl_processor)
    model = family.build_model()
    save_for_vllm(model, family.processing_class, tmp_path / "model")
    prompts = [geometry_prompt(row) for row in make_problems(3, split="test")]
    requests = [Request(prompt["prompt"], 2**62 + seed, prompt["images"]) for seed, prompt in enumerate(prompts)]
    requests += [Request([{"role": "user", "content": "Find AB+BC."}], 3)]
    requests += [Request(requests[0].prompt, 11, requests[0].images)]

    settings = {"dtype": "float32", "max_new_tokens": 8}
    sampling = {"temperature": 1.0, "top_p": 0.95, "vllm_max_model_length": 256}
    found = generate(tmp_path, requests, settings | sampling)
    assert found["there"] == found["back"]
    assert found["there"][0]["text"] != found["there"][-1]["text"]
    assert {generation["finish_reason"] for generation in found["there"]} <= {"stop", "length"}
    assert all(1 <= generation["tokens"] <= 8 for generation in found["there"])

    backend = TransformersBackend(EvalArguments(model=str(tmp_path / "model"), temperature=0.0, **settings))
    assert found["greedy"] == [vars(generation) for generation in backend.generate(requests)]
