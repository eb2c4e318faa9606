"""Rollouts from a server, against a small one that speaks vLLM's endpoints; `tests/vllm` has the real one."""

import base64
import copy
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from sapo_trl.generation import (
    SamplerError,
    SamplerLostError,
    VLLMServerRollout,
    train_with_checkpoint,
    vllm_server,
)
from tests.testing_utils import (
    Recorder,
    fixed_rollout,
    length_reward,
    random_completions,
    sapo_trainer,
    state_of,
)
from tests.vllm.servers import free_port
from tests.vllm.stub import StubServer, stub_server


ROOT = Path(__file__).parents[2]
TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
VISION_FAMILY = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)


def connect(server: StubServer, folder: Path, **settings) -> VLLMServerRollout:
    return VLLMServerRollout(server.url, folder / "weights", **{"retries": 2, "backoff": 0.01, **settings})


def trainer_on(family, folder, rollout, callbacks=(), trainer_kwargs=None, **overrides):
    settings = {"max_steps": 3, "num_generations": 2, "per_device_train_batch_size": 4, "learning_rate": 0.03}
    settings |= {"num_mini_batches": 1, "temperature": 0.7}
    kwargs = {"rollout_func": rollout, "callbacks": list(callbacks), **(trainer_kwargs or {})}
    return sapo_trainer(family, folder, trainer_kwargs=kwargs, **settings | overrides)


class Kept:
    """A `rollout_func` that keeps what the one inside returned."""

    def __init__(self, rollout):
        self.rollout = rollout
        self.outputs = []

    def __call__(self, prompts, trainer):
        self.outputs.append(self.rollout(prompts, trainer))
        return self.outputs[-1]


class AtStep(TrainerCallback):
    """Does something after some step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@pytest.fixture
def server():
    with stub_server() as stub:
        yield stub


def serve(server: StubServer, family) -> None:
    server.first_model = server.model = family.build_model(seed=1).eval()


@TEXT_FAMILY
class TestTraining:
    def test_each_rollout_is_sampled_from_the_policy_as_it_is_then(self, family, server, tmp_path):
        serve(server, family)  # other weights than the trainer's
        kept, recorder = Kept(connect(server, tmp_path)), Recorder()
        trainer = trainer_on(family, tmp_path, kept, [recorder])
        trainer.train()
        assert recorder.steps == [0, 1, 2]
        paths = [path for path, _ in server.requests]
        # The server dies of embeddings of images that only half of it has forgotten.
        for path in ("/collective_rpc", "/reset_prefix_cache", "/reset_encoder_cache", "/update_weight_version"):
            assert paths.count(path) == 3
        for output, rollout in zip(kept.outputs, recorder.rollouts, strict=True):
            for row, logps in enumerate(output["logprobs"]):
                ids = output["completion_ids"][row]
                assert rollout.completion_ids[row, : len(ids)].tolist() == ids
                torch.testing.assert_close(rollout.logps[row, : len(ids)], torch.tensor(logps), atol=1e-4, rtol=0)

    def test_requests_carry_the_settings(self, family, server, tmp_path):
        serve(server, family)
        settings = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "max_completion_length": 6}
        kept = Kept(connect(server, tmp_path))
        trainer = trainer_on(
            family, tmp_path, kept, max_steps=2, generation_kwargs={"frequency_penalty": 0.5}, **settings
        )
        trainer.train()
        sent = server.sent_to("/v1/completions")
        assert len(sent) == 4  # two prompts, two responses each, two steps
        settings["max_tokens"] = settings.pop("max_completion_length")
        for body in sent:
            expected = {
                "model": "stub",
                "n": 2,
                "temperature": 0.7,
                "frequency_penalty": 0.5,
                "logprobs": 0,
                **settings,
            }
            assert {name: body[name] for name in expected} == expected
            assert body["stop_token_ids"] == trainer.eos_token_ids
            assert body["prompt"] in kept.outputs[0]["prompt_ids"] + kept.outputs[1]["prompt_ids"]
        assert len({body["seed"] for body in sent}) == 4
        rows = kept.outputs[0]["prompt_ids"]
        assert rows[0] == rows[1] != rows[2] == rows[3]

    def test_responses_keep_their_order(self, family, server, tmp_path):
        """The server's answers come in any order, but a repeated run is to train on the same batch."""
        serve(server, family)
        rollout = connect(server, tmp_path)
        output = rollout([prompts_of(family)[0]] * 3, trainer_on(family, tmp_path, rollout))
        (body,) = server.sent_to("/v1/completions")
        assert output["completion_ids"] == [server._sample(body, index)[0] for index in range(3)]

    def test_a_run_can_be_repeated_and_an_unseeded_one_has_no_seed(self, family, server, tmp_path):
        serve(server, family)
        outputs = []
        for name in ("first", "second"):
            kept = Kept(connect(server, tmp_path / name))
            trainer_on(family, tmp_path / name, kept, max_steps=2, gradient_accumulation_steps=2).train()
            outputs.append([output["completion_ids"] for output in kept.outputs])
        assert outputs[0] == outputs[1]
        assert outputs[0][0] != outputs[0][1]
        server.requests.clear()
        trainer_on(family, tmp_path, connect(server, tmp_path, seeded=False), max_steps=1).train()
        assert not any("seed" in body for body in server.sent_to("/v1/completions"))

    def test_trls_own_trainer_takes_it_and_weights_are_sent_once_per_step(self, family, server, tmp_path):
        """Two rollouts between two optimizer steps are sampled from the same weights, and so are two evaluations."""
        serve(server, family)
        args = GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2,
            steps_per_generation=1,
            num_generations=2,
            max_completion_length=8,
            max_steps=2,
            learning_rate=0.1,
            bf16=False,
            use_cpu=True,
            report_to="none",
            dataloader_pin_memory=False,
        )
        trainer = GRPOTrainer(
            model=family.build_model(),
            reward_funcs=length_reward,
            args=args,
            train_dataset=family.dataset(),
            eval_dataset=family.dataset(2),
            processing_class=family.processing_class,
            rollout_func=connect(server, tmp_path),
        )
        trainer.train()
        assert [path for path, _ in server.requests].count("/collective_rpc") == 2
        assert len(server.sent_to("/v1/completions")) == 2 * 2
        assert len({body["seed"] for body in server.sent_to("/v1/completions")}) == 4
        trainer.evaluate()
        trainer.evaluate()
        assert [path for path, _ in server.requests].count("/collective_rpc") == 3

    def test_tools_are_refused(self, family, server, tmp_path):
        serve(server, family)
        trainer = trainer_on(family, tmp_path, connect(server, tmp_path))
        trainer.tools = [len]
        with pytest.raises(ValueError, match="tools"):
            trainer.train()


LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}


@TEXT_FAMILY
class TestWeights:
    @pytest.mark.parametrize("critic", ["separate", "shared", "none", "adapter", "ladder"])
    def test_the_policy_is_written_and_nothing_of_the_critic(self, family, server, tmp_path, critic):
        serve(server, family)
        trainer = trainer_on(
            family,
            tmp_path,
            connect(server, tmp_path),
            trainer_kwargs=LORA if critic == "adapter" else None,
            critic=critic,
            **({"advantage_estimator": "batch"} if critic == "none" else {}),
        )
        written = []
        trainer.add_callback(AtStep(3, lambda: written.append(trainer.rollout_func(prompts_of(family), trainer))))
        trainer.train()
        (folder,) = (tmp_path / "weights").iterdir()
        assert folder.name.startswith("policy-step-3-")
        names = family.build_model().state_dict().keys()
        written = load_file(folder / "model.safetensors")
        assert written.keys() == names
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if critic != "adapter":
            assert all(torch.equal(written[name], tensor) for name, tensor in policy.state_dict().items())
            if critic == "separate":
                backbone = trainer.critic.value_head.state_dict()
                assert not any(torch.equal(t, o) for t in written.values() for o in backbone.values() if t.dim() > 1)
            return
        layer = policy.base_model.model.model.layers[0].self_attn.q_proj
        merged = layer.base_layer.weight + layer.get_delta_weight("default")
        torch.testing.assert_close(written["model.layers.0.self_attn.q_proj.weight"], merged)
        with_critic = merged + layer.get_delta_weight("critic")
        assert not torch.allclose(written["model.layers.0.self_attn.q_proj.weight"], with_critic)

    def test_merging_leaves_no_trace(self, family, server, tmp_path):
        serve(server, family)
        rollout = connect(server, tmp_path)
        lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        trainer = trainer_on(family, tmp_path, rollout, trainer_kwargs={"peft_config": lora}, critic="shared")
        before = state_of(trainer.model)
        rollout(prompts_of(family), trainer)
        after = state_of(trainer.model)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert load_file(next((tmp_path / "weights").iterdir()) / "model.safetensors").keys() == (
            family.build_model().state_dict().keys()
        )

    def test_adapters_that_cannot_be_merged_are_an_error(self, family, server, tmp_path):
        serve(server, family)
        model = get_peft_model(
            family.build_model(), PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
        )
        rollout = connect(server, tmp_path)
        trainer = sapo_trainer(
            family, tmp_path, model=model, trainer_kwargs={"rollout_func": rollout}, critic="shared"
        )
        with pytest.raises(ValueError, match="cannot be merged"):
            rollout(prompts_of(family), trainer)

    def test_what_a_dead_run_left_is_removed(self, family, server, tmp_path):
        serve(server, family)
        weights = tmp_path / "weights"
        (weights / "incomplete-policy").mkdir(parents=True)
        (weights / "incomplete-policy" / "model.safetensors").write_bytes(b"half")
        (weights / "policy-step-7-0123abcd").mkdir()
        (weights / "policy-step-notes").mkdir()
        rollout = connect(server, tmp_path)
        rollout(prompts_of(family), trainer_on(family, tmp_path, rollout))
        names = sorted(folder.name for folder in weights.iterdir())
        assert len(names) == 2 and names[0].startswith("policy-step-0-") and names[1] == "policy-step-notes"


def prompts_of(family) -> list:
    return [row["prompt"] for row in family.dataset(2)]


class TestPrompts:
    @pytest.mark.parametrize("family", ["qwen2", "qwen2_5_vl"], indirect=True)
    def test_are_tokenized_as_trl_tokenizes_them(self, family, server, tmp_path):
        serve(server, family)
        server.image_token_id = getattr(family.processing_class, "image_token_id", -1)
        seen = []

        def rollout(prompts, trainer):
            seen.append((copy.deepcopy(prompts), sampler(prompts, trainer)))
            return fixed_rollout(random_completions())(prompts, trainer)

        sampler = connect(server, tmp_path)
        trainer = trainer_on(family, tmp_path, rollout, max_steps=2, beta=0.0)
        trainer.train()
        for prompts, output in seen:
            expected = trainer.tokenized_prompts([{"prompt": prompt} for prompt in prompts])
            assert output["prompt_ids"] == [list(ids) for ids in expected.ids]
            assert len(output["completion_ids"]) == len(output["logprobs"]) == len(prompts) == 4

    @TEXT_FAMILY
    def test_may_be_texts(self, family, server, tmp_path):
        serve(server, family)
        rollout = connect(server, tmp_path)
        trainer = trainer_on(family, tmp_path, rollout)
        output = rollout(["Find AB.", "Find AB.", "Find BC+CD."], trainer)
        rows = [{"prompt": text} for text in ("Find AB.", "Find AB.", "Find BC+CD.")]
        assert output["prompt_ids"] == [list(ids) for ids in trainer.tokenized_prompts(rows).ids]
        assert [body["n"] for body in server.sent_to("/v1/completions")] in ([2, 1], [1, 2])

    @VISION_FAMILY
    def test_with_and_without_images_go_to_the_server_together(self, family, server, tmp_path):
        serve(server, family)
        server.image_token_id = family.processing_class.image_token_id
        rollout = connect(server, tmp_path)
        trainer = trainer_on(family, tmp_path, rollout)
        picture = Image.new("RGBA", (56, 56), (10, 200, 30, 128))
        block, text = {"type": "image", "image": picture}, {"type": "text", "text": "Find AB."}
        pictured = [{"role": "user", "content": [block, text]}]
        two = [{"role": "user", "content": [block, text, {"type": "image", "image": picture.convert("L")}]}]
        plain = [{"role": "user", "content": [text]}]
        output = rollout([pictured, copy.deepcopy(pictured), two, plain], trainer)
        pads = [ids.count(server.image_token_id) for ids in output["prompt_ids"]]
        assert pads == [4, 4, 8, 0]
        sent = sorted(server.sent_to("/inference/v1/generate"), key=lambda body: len(body["content_parts"]))
        assert [body["sampling_params"]["n"] for body in sent] == [2, 1]
        assert [body["token_ids"].count(server.image_token_id) for body in sent] == [1, 2]
        for part in [part for body in sent for part in body["content_parts"]]:
            prefix, _, data = part["url"].partition(",")
            assert prefix == "data:image/png;base64"
            # As the trainer's image processor sees them, which looks at no transparency.
            assert Image.open(io.BytesIO(base64.b64decode(data))).mode == "RGB"
        assert output["completion_ids"][:3] == [[7, 8, 9]] * 3
        assert output["logprobs"][:3] == [[-1.0] * 3] * 3
        assert len(server.sent_to("/v1/completions")) == 1

    @VISION_FAMILY
    def test_that_the_server_reads_otherwise_are_an_error(self, family, server, tmp_path):
        serve(server, family)
        server.image_token_id, server.pads_per_image = family.processing_class.image_token_id, 7
        with pytest.raises(SamplerError, match="another prompt than the trained prompt"):
            trainer_on(family, tmp_path, connect(server, tmp_path)).train()

    @VISION_FAMILY
    def test_with_images_name_the_option_that_they_need(self, family, server, tmp_path):
        serve(server, family)
        server.without = {"/inference/v1/generate"}
        with pytest.raises(SamplerError, match="--enable-scale-out"):
            trainer_on(family, tmp_path, connect(server, tmp_path)).train()


class TestStart:
    def test_without_a_server(self, tmp_path):
        url = f"http://127.0.0.1:{free_port()}"
        with pytest.raises(SamplerLostError, match=f"(?s){url}.*api_server.*docs/vllm.md"):
            VLLMServerRollout(url, tmp_path)

    @TEXT_FAMILY
    def test_waits_for_a_server_that_is_starting(self, family, tmp_path):
        port = free_port()
        started = []

        def start_late():
            time.sleep(0.5)
            started.append(StubServer(family.build_model().eval(), port))

        thread = threading.Thread(target=start_late)
        thread.start()
        assert VLLMServerRollout(f"http://127.0.0.1:{port}", tmp_path, start_timeout=30).model == "stub"
        thread.join()
        started[0].stop()

    @TEXT_FAMILY
    def test_without_developer_endpoints(self, family, server, tmp_path):
        serve(server, family)
        server.without = {"/weight_info"}
        with pytest.raises(SamplerError, match="VLLM_SERVER_DEV_MODE=1"):
            connect(server, tmp_path)

    @TEXT_FAMILY
    def test_with_log_probabilities_of_another_distribution(self, family, server, tmp_path):
        serve(server, family)
        server.raw_logprobs = True
        with pytest.raises(SamplerError, match="--logprobs-mode processed_logprobs"):
            connect(server, tmp_path)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"timeout": 0}, "timeout"), ({"retries": -1}, "retries"), ({"base_url": "localhost:8000"}, "http://")],
    )
    def test_settings_out_of_range(self, settings, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            VLLMServerRollout(**{"base_url": "http://localhost:1", "weights_dir": tmp_path, **settings})


@TEXT_FAMILY
class TestFaults:
    def test_passing_ones_are_survived_and_logged(self, family, server, tmp_path, caplog):
        serve(server, family)
        rollout = connect(server, tmp_path)
        server.statuses, server.broken_connections, server.is_busy = [503], 1, 2
        with caplog.at_level(logging.WARNING):
            output = rollout(prompts_of(family), trainer_on(family, tmp_path, rollout))
        assert len(output["completion_ids"]) == 2
        assert len([record for record in caplog.records if "follows in" in record.message]) == 2
        assert [path for path, _ in server.requests].count("/reset_prefix_cache") == 3

    def test_a_refusal_is_not_repeated(self, family, server, tmp_path):
        serve(server, family)
        rollout = connect(server, tmp_path)
        server.statuses = [400]
        with pytest.raises(SamplerError, match="400.*as ordered") as caught:
            rollout(prompts_of(family)[:1], trainer_on(family, tmp_path, rollout))
        assert not isinstance(caught.value, SamplerLostError)
        assert len(server.sent_to("/v1/completions")) == 1

    def test_a_server_restarted_in_the_middle_of_a_rollout_gets_the_weights_again(
        self, family, server, tmp_path, caplog
    ):
        serve(server, family)
        kept, recorder = Kept(connect(server, tmp_path)), Recorder()
        # Forgets what it was sent between the two prompts of the second rollout.
        server.forgets_at = {4}
        with caplog.at_level(logging.WARNING):
            trainer_on(family, tmp_path, kept, [recorder]).train()
        assert sum("repeated" in record.message for record in caplog.records) == 1
        assert [path for path, _ in server.requests].count("/collective_rpc") == 4
        for output, rollout in zip(kept.outputs, recorder.rollouts, strict=True):
            for row, logps in enumerate(output["logprobs"]):
                torch.testing.assert_close(rollout.logps[row, : len(logps)], torch.tensor(logps), atol=1e-4, rtol=0)

    @pytest.mark.parametrize(
        "answer",
        [
            {},
            [],
            {"choices": [{"index": 0, "token_ids": None, "logprobs": None, "finish_reason": "stop"}]},
            {
                "choices": [
                    {"index": 0, "token_ids": ["7"], "logprobs": {"token_logprobs": [0.0]}, "finish_reason": "stop"}
                ]
            },
        ],
    )
    def test_an_answer_of_another_kind_is_an_error_that_says_so(self, family, server, tmp_path, monkeypatch, answer):
        serve(server, family)
        rollout = connect(server, tmp_path)
        trainer = trainer_on(family, tmp_path, rollout)
        respond = server.respond
        monkeypatch.setattr(
            server, "respond", lambda path, body: answer if path == "/v1/completions" else respond(path, body)
        )
        with pytest.raises(SamplerError, match="The answer of /v1/completions is not in vLLM.s form"):
            rollout(prompts_of(family)[:1], trainer)

    def test_an_answer_that_is_too_large_for_its_tokens(self, family, server, tmp_path, monkeypatch):
        serve(server, family)
        monkeypatch.setattr(vllm_server, "MAX_ANSWER_BYTES", 0)
        monkeypatch.setattr(vllm_server, "TOKEN_BYTES", 2)
        rollout = connect(server, tmp_path)
        with pytest.raises(SamplerError, match=r"answered with more than \d+ bytes"):
            rollout(prompts_of(family)[:1], trainer_on(family, tmp_path, rollout))

    def test_a_server_that_another_run_uses_is_an_error(self, family, server, tmp_path):
        serve(server, family)
        rollout = connect(server, tmp_path)
        server.forgets_at = set(range(100))
        with pytest.raises(SamplerLostError, match="one run at a time"):
            rollout(prompts_of(family), trainer_on(family, tmp_path, rollout))

    def test_responses_that_were_given_up_are_not_trained_on(self, family, server, tmp_path):
        serve(server, family)
        rollout = connect(server, tmp_path)
        server.finish_reason = "abort"
        with pytest.raises(SamplerLostError, match="gave up requests"):
            rollout(prompts_of(family), trainer_on(family, tmp_path, rollout))

    def test_a_lost_server_ends_the_run_with_a_checkpoint(self, family, tmp_path):
        port = free_port()
        undisturbed, kept = [], []
        with stub_server(family.build_model(seed=1).eval(), port) as server:
            trainer = trainer_on(family, tmp_path / "undisturbed", connect(server, tmp_path), max_steps=4)
            trainer.train()
            undisturbed = state_of(trainer.model)
        with stub_server(family.build_model(seed=1).eval(), port) as server:
            rollout = connect(server, tmp_path)
            trainer = trainer_on(family, tmp_path, rollout, [AtStep(2, server.stop)], max_steps=4)
            started = time.monotonic()
            with pytest.raises(SamplerLostError, match="(?s)failed 3 time.*step 2.*resume_from_checkpoint=True"):
                train_with_checkpoint(trainer)
            assert time.monotonic() - started < 30
        assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
        assert not (tmp_path / "checkpoint-2" / "checkpoint-is-incomplete.txt").exists()
        with stub_server(family.build_model(seed=1).eval(), port) as server:
            kept = Kept(connect(server, tmp_path))
            trainer = trainer_on(family, tmp_path, kept, max_steps=4)
            train_with_checkpoint(trainer, resume_from_checkpoint=True)
        assert len(kept.outputs) == 2
        resumed = state_of(trainer.model)
        assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)

    def test_lost_before_the_first_step_there_is_nothing_to_save(self, family, tmp_path):
        with stub_server(family.build_model().eval()) as server:
            trainer = trainer_on(family, tmp_path, connect(server, tmp_path))
            server.stop()
            with pytest.raises(SamplerLostError):
                train_with_checkpoint(trainer)
        assert get_last_checkpoint(tmp_path) is None


@pytest.mark.slow
class TestTwoProcesses:
    def run(self, server, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["-m", "tests.vllm.two_processes", server.url, str(folder), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    @TEXT_FAMILY
    def test_each_samples_its_own_prompts_from_the_same_weights(self, family, server, tmp_path):
        serve(server, family)
        result = self.run(server, tmp_path)
        assert result.returncode == 0, result.stderr[-4000:]
        reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
        assert [report["world_size"] for report in reports] == [2, 2]
        assert max(gap for report in reports for gap in report["gaps"]) < 1e-4
        assert [len(report["gaps"]) for report in reports] == [3, 3]
        assert reports[0]["completion_ids"] != reports[1]["completion_ids"]
        assert [path for path, _ in server.requests].count("/collective_rpc") == 3
        assert len({body["seed"] for body in server.sent_to("/v1/completions")}) == 3 * 2 * 1

    @TEXT_FAMILY
    def test_both_end_when_one_fails(self, family, server, tmp_path):
        serve(server, family)
        started = time.monotonic()
        result = self.run(server, tmp_path, "--lose-on-rank", "1")
        assert result.returncode != 0
        assert time.monotonic() - started < 120
        reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
        assert [report["error"] for report in reports] == ["SamplerLostError", "SamplerLostError"]
        assert "Process 1 failed" in reports[0]["message"]
