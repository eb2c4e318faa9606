import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from sapo_trl import PRESETS, Segments
from sapo_trl.embedded import build_model, build_processor
from tests.testing_utils import FAMILIES, sapo_trainer


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
def test_the_card_of_a_run(family, tmp_path):
    trainer = sapo_trainer(family, tmp_path / "my-run", segmentation="newline", lam=0.5)
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "my-run" / "README.md")
    assert {"sapo", "trl", "segment-aligned-policy-optimization"} <= set(card.data.tags)
    for part in (
        "# Model Card for my-run",
        "Gao, Lei and Li, Zhuoming",
        "booktitle    = {International Conference on Machine Learning}",
        "note         = {arXiv:2605.01327}",
        "(ICML 2026, [arXiv 2605.01327](https://huggingface.co/papers/2605.01327))",
        "but for `segmentation='newline'`, `lam=0.5`",
        "arxiv 2511.20347",
        "| `learning_rate` | `0.1` |",
        "- sapo_trl: ",
        'pipeline("image-text-to-text"' if family.takes_images else 'pipeline("text-generation"',
    ):
        assert part.lower() in card.text.lower(), part
    last = [entry for entry in trainer.state.log_history if "reward" in entry][-1]
    assert f"| `reward` | {last['reward']:.4g} | {last['step']} |" in card.text
    assert f"| `rewards/length_reward/mean` | {last['reward']:.4g} | {last['step']} |" in card.text
    value_loss = [entry["critic/loss"] for entry in trainer.state.log_history if "critic/loss" in entry][-1]
    assert f"| `critic/loss` | {value_loss:.4g} | 2 |" in card.text
    assert "None" not in card.text.replace("`None`", "")
    # Nothing that is not there to be saved elsewhere.
    trainer.save_model(str(tmp_path / "copy"))
    assert not (tmp_path / "copy" / "README.md").exists()


def test_another_algorithm_is_not_called_sapo(tokenizer, tmp_path):
    settings = {**PRESETS["vc_ppo"].settings, "lam": 0.5}
    kwargs = {"segmenter": lambda entropies, mask: Segments.from_last_tokens(mask, mask)}
    trainer = sapo_trainer(FAMILIES["qwen2"](tokenizer), tmp_path, trainer_kwargs=kwargs, **settings)
    trainer.create_model_card(dataset_name="hiyouga/geometry3k")
    card = ModelCard.load(tmp_path / "README.md")
    assert (
        "with the preset `vc_ppo`" in card.text and "but for `lam=0.5`, cutting responses with `<lambda>`" in card.text
    )
    assert "a method introduced in" not in card.text
    assert "Nothing was logged" in card.text
    assert card.data.datasets == "hiyouga/geometry3k"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload asks for; what is committed is in `files`."""

    files: dict[str, bytes] = {}
    created: list[dict] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer({"url": "https://huggingface.co/someone/my-run", "name": "someone/my-run"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {"success": True, "commitOid": "0" * 40, "commitUrl": "https://huggingface.co/someone/my-run/commit/0"}
            )
        else:  # whether the card's metadata are valid
            self.answer({"errors": [], "warnings": []}, 200 if self.path == "/api/validate-yaml" else 404)

    def do_GET(self):
        self.answer({}, 404)

    def answer(self, content: dict, status: int = 200):
        sent = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args):
        print(*args)


@pytest.mark.slow
def test_push_to_hub(tmp_path):
    """The command, up to the Hub's API, of which a server of this test's plays the part."""
    build_model().save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    settings = {"model_name_or_path": "model", "output_dir": "out", "embedded_problems": 8, "max_steps": 1}
    settings |= {"per_device_train_batch_size": 2, "num_mini_batches": 1, "max_completion_length": 4}
    settings |= {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "checkpoint", "hub_always_push": "true"}
    settings |= {"push_to_hub": "true", "hub_model_id": "someone/my-run", "hub_token": "hf_of_this_test"}
    command = [sys.executable, "-m", "sapo_trl.cli", "train", "--config", ROOT / "trainer_configs" / "embedded.yaml"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    environment["PYTHONPATH"] = str(ROOT)
    try:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-4000:]
    assert Hub.created and all(request["name"] == "my-run" for request in Hub.created)
    assert {"README.md", "config.json", "model.safetensors", "critic/model.safetensors"} <= Hub.files.keys()
    # The whole checkpoint is there, and neither an unfinished one nor the note about the run that has the folder.
    assert {"last-checkpoint/critic_optimizer.pt", "last-checkpoint/process_state_0.pt"} <= Hub.files.keys()
    assert not [name for name in Hub.files if name.startswith("_") or "incomplete" in name]
    assert Hub.files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    card = ModelCard(Hub.files["README.md"].decode())
    assert 'model="someone/my-run"' in card.text and "2605.01327" in card.text
    assert card.data.datasets is None  # "embedded" is none of the Hub's
