"""The evaluation's vLLM backend, with a real engine, against its transformers backend."""

import json
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from sapo_trl.data import geometry_prompt
from sapo_trl.embedded import make_problems
from sapo_trl.evaluation.backends import Request
from sapo_trl.evaluation.backends.transformers import TransformersBackend
from sapo_trl.evaluation.settings import EvalArguments

from ..testing_utils import FAMILIES
from .servers import VLLM_PYTHON, save_for_vllm


ROOT = Path(__file__).parent.parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM_PYTHON, reason="SAPO_TRL_VLLM_PYTHON names no Python with vLLM: `make test-vllm`"),
]


def generate(folder, requests, **settings):
    """Both runs of `generation_backend.py`."""
    entries = []
    for index, request in enumerate(requests):
        names = [f"{index}-{place}.png" for place in range(len(request.images))]
        for name, image in zip(names, request.images, strict=True):
            image.save(folder / name)
        entries.append({"prompt": request.prompt, "seed": request.seed, "images": names})
    settings |= {"dtype": "float32", "vllm_max_model_length": 256}
    (folder / "requests.json").write_text(json.dumps({"requests": entries, "settings": settings}))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    script = Path(__file__).with_name("generation_backend.py")
    result = subprocess.run(
        [VLLM_PYTHON, str(script), str(folder), sysconfig.get_path("purelib")],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "generations.json").read_text())


@pytest.fixture
def requests():
    """Three with a picture, one without."""
    rows = make_problems(3, split="test")
    prompts = [geometry_prompt(row) for row in rows]
    drawn = [Request(prompt["prompt"], 2**62 + seed, prompt["images"]) for seed, prompt in enumerate(prompts)]
    return [*drawn, Request([{"role": "user", "content": "Find AB+BC."}], 3)]


@pytest.fixture
def family(qwen2_5_vl_processor, tmp_path):
    family = FAMILIES["qwen2_5_vl"](qwen2_5_vl_processor)
    save_for_vllm(family.build_model(), family.processing_class, tmp_path / "model")
    return family


def test_greedy_texts_are_those_of_transformers(family, requests, tmp_path):
    settings = {"temperature": 0.0, "max_new_tokens": 8}
    found, again = generate(tmp_path, requests, **settings)
    family.processing_class.save_pretrained(tmp_path / "model")  # as this package's environment reads it
    backend = TransformersBackend(EvalArguments(model=str(tmp_path / "model"), dtype="float32", **settings))
    assert found == again == [vars(generation) for generation in backend.generate(requests)]


def test_a_sample_is_its_seeds_in_any_order(family, requests, tmp_path):
    twice = [*requests, Request(requests[0].prompt, 11, requests[0].images)]
    found, again = generate(tmp_path, twice, temperature=1.0, top_p=0.95, max_new_tokens=16)
    assert found == again
    assert found[0]["text"] != found[-1]["text"]
    assert all(1 <= generation["tokens"] <= 16 for generation in found)
