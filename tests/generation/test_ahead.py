"""One rollout ahead: which prompts, which weights, when; against a small server that speaks vLLM's endpoints."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from sapo_trl import StopOnSignal
from sapo_trl.generation import SamplerLostError, VLLMServerRollout, train_with_checkpoint
from sapo_trl.run_folder import newest_checkpoint
from tests.testing_utils import (
    Recorder,
    fixed_rollout,
    logged,
    never_logged,
    random_completions,
    sapo_trainer,
    text_dataset,
)
from tests.vllm.stub import stub_server


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
VISION_FAMILY = pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)


class Kept(VLLMServerRollout):
    """Keeps the responses that the trainer gets, and the weights' steps of the rollouts that it requests."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.requested = []

    def request(self, prompts, trainer, step):
        self.requested.append((trainer.state.global_step, step))
        return super().request(prompts, trainer, step)


class At(TrainerCallback):
    """Does something after some optimizer step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


class Weights(TrainerCallback):
    """Keeps the policy's weights after each optimizer step."""

    def __init__(self):
        self.states = {}

    def keep(self, model, step):
        self.states[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.keep(model, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.keep(model, state.global_step)


@pytest.fixture
def server(family):
    with stub_server(family.build_model(seed=1).eval()) as stub:
        yield stub


def connect(server, folder, **settings):
    return Kept(server.url, folder / "weights", **{"retries": 2, "backoff": 0.01, **settings})


def trainer_on(family, folder, rollout, callbacks=(), trainer_kwargs=None, **overrides):
    """Rollouts of two prompts, two responses each, that last for two optimizer steps; four of them are an epoch."""
    settings = {"max_steps": 12, "num_generations": 2, "per_device_train_batch_size": 2, "learning_rate": 0.03}
    settings |= {"num_mini_batches": 2, "critic": "none", "advantage_estimator": "batch", "rollouts_ahead": 1}
    kwargs = {"rollout_func": rollout, "callbacks": list(callbacks), **(trainer_kwargs or {})}
    return sapo_trainer(family, folder, trainer_kwargs=kwargs, **settings | overrides)


def prompts_of(recorder):
    """The token ids of the prompts of each rollout, without padding."""
    return [
        [ids[mask.bool()].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
        for rollout in recorder.rollouts
    ]


def run(family, server, folder, callbacks=(), resume=None, **overrides):
    recorder = Recorder()
    trainer = trainer_on(family, folder, connect(server, folder), [recorder, *callbacks], **overrides)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


@TEXT_FAMILY
class TestOrder:
    @pytest.mark.parametrize(
        "settings",
        [
            {"num_train_epochs": 3, "max_steps": -1},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "max_steps": 7},
            {"num_iterations": 2, "max_steps": 10},
            {"num_mini_batches": 1, "per_device_train_batch_size": 8, "max_steps": 5},  # half an epoch is a rollout
            {"shuffle_dataset": False, "max_steps": 5, "dataloader_num_workers": 1},
            {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "max_steps": 9},
        ],
        ids=["epochs", "accumulation", "iterations", "large", "workers", "evaluation"],
    )
    def test_prompts_and_seeds_are_those_of_a_run_that_waits(self, family, server, settings, tmp_path):
        """A policy that does not move gives the same responses whenever it is asked."""
        kwargs = {"eval_dataset": family.dataset(2)} if "eval_steps" in settings else {}
        runs, sent = [], []
        for ahead in (0, 1):
            folder = tmp_path / str(ahead)
            server.asked_of.clear()
            runs.append(
                run(family, server, folder, learning_rate=0.0, rollouts_ahead=ahead, trainer_kwargs=kwargs, **settings)
            )
            sent.append(sorted(prompt for _, prompt in server.asked_of))
        (waiting, expected), (trainer, found) = runs
        assert found.steps == expected.steps and len(found.steps) > 2
        assert prompts_of(found) == prompts_of(expected)
        for rollout, wanted in zip(found.rollouts, expected.rollouts, strict=True):
            assert torch.equal(rollout.completion_ids, wanted.completion_ids)
        assert sent[0] == sent[1]  # nothing is asked in vain, nor twice
        assert trainer.state.global_step == waiting.state.global_step
        assert never_logged(waiting, "sampling/age")

    def test_a_stream_is_read_once_and_in_its_order(self, family, server, tmp_path):
        rows, read = list(text_dataset(8)), []

        def stream():
            return Dataset.from_list(rows).to_iterable_dataset().map(note)

        def note(row):
            read.append(row["answer"])
            return row

        orders = []
        for ahead in (0, 1):
            read.clear()
            kwargs = {"train_dataset": stream()}
            folder = tmp_path / str(ahead)
            settings = {"learning_rate": 0.0, "max_steps": 12, "rollouts_ahead": ahead}
            _, recorder = run(family, server, folder, trainer_kwargs=kwargs, **settings)
            orders.append((prompts_of(recorder), recorder.steps))
        assert orders[0] == orders[1] and len(orders[0][0]) == 6
        assert len(read) <= 3 * 8

    def test_each_rollout_comes_from_the_weights_before_the_update(self, family, server, tmp_path):
        recorder, weights = Recorder(), Weights()
        trainer, _ = run(family, server, tmp_path, [recorder, weights])
        assert recorder.steps == [0, 2, 4, 6, 8, 10]
        assert [rollout.sampled_at for rollout in recorder.rollouts] == [0, 0, 2, 4, 6, 8]
        assert logged(trainer, "sampling/age") == [0, 1, 1, 1, 1, 1]
        asked = [int(name.split("-")[2]) for name, _ in server.asked_of]
        assert asked == [step for step in (0, 0, 2, 4, 6, 8) for _ in range(2)]
        assert [path for path, _ in server.requests].count("/collective_rpc") == 5
        # The same weights, prompt and seed give the same tokens.
        bodies = server.sent_to("/v1/completions")
        for number, rollout in enumerate(recorder.rollouts):
            server.model = family.build_model().eval()
            server.model.load_state_dict(weights.states[rollout.sampled_at])
            sampled = []
            for body in sorted(bodies[2 * number : 2 * number + 2], key=lambda body: body["prompt"]):
                sampled += [(body["prompt"], server._sample(body, index)[0]) for index in range(2)]
            completions = [
                ids[kept].tolist() for ids, kept in zip(rollout.completion_ids, rollout.segments.mask, strict=True)
            ]
            assert sorted(zip(prompts_of(recorder)[number], completions, strict=True)) == sorted(sampled)
        server.model.load_state_dict(weights.states[10])  # and other weights give others
        assert server._sample(body, 1)[0] != sampled[-1][1]

    def test_weights_are_sent_between_rollouts(self, family, server, tmp_path):
        """Also by evaluations, which need the present policy: between a rollout's requests there is none."""
        run(
            family,
            server,
            tmp_path,
            max_steps=8,
            eval_strategy="steps",
            eval_steps=1,
            per_device_eval_batch_size=2,
            trainer_kwargs={"eval_dataset": family.dataset(2)},
        )
        events = [
            "load" if path == "/collective_rpc" else "ask"
            for path, body in server.requests
            if path == "/collective_rpc" or (path == "/v1/completions" and body["max_tokens"] != 1)
        ]
        runs = "".join("L" if event == "load" else "a" for event in events).split("L")
        assert runs[0] == "" and len(runs) == 1 + 9
        assert any(runs) and all(len(asked) % 2 == 0 for asked in runs)


@TEXT_FAMILY
class TestOverlap:
    def test_the_server_samples_while_the_policy_is_updated(self, family, server, tmp_path):
        """The second rollout is answered after the first one's last step, which a run that waits would not reach."""
        server.held_from = 3
        trainer, recorder = run(family, server, tmp_path, [At(2, server.release.set)], max_steps=6)
        assert recorder.steps == [0, 2, 4]

    def test_an_evaluation_waits_for_it_and_leaves_it_alone(self, family, server, tmp_path):
        server.held_from = 3
        released = []

        def release_later():
            time.sleep(0.5)
            released.append((len(server.asked_of), len(server.sent_to("/v1/completions"))))
            server.release.set()

        timer = threading.Thread(target=release_later)
        settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4, "per_device_eval_batch_size": 2}
        kwargs = {"eval_dataset": family.dataset(2)}
        _, recorder = run(family, server, tmp_path, [At(1, timer.start)], trainer_kwargs=kwargs, **settings)
        timer.join()
        assert released == [(4, 2)]  # two rollouts were asked for and the first is answered; no evaluation yet
        training = [rollout for rollout in recorder.rollouts if rollout.mode == "train"]
        assert [rollout.sampled_at for rollout in training] == [0, 0]
        assert len(recorder.rollouts) == 2 + 4 * 2  # two batches in each evaluation


@VISION_FAMILY
def test_pictures_of_the_next_prompts_are_sent_as_those_of_a_run_that_waits(family, tmp_path):
    sent = []
    for ahead in (0, 1):
        with stub_server(family.build_model().eval()) as server:
            server.image_token_id = family.processing_class.image_token_id
            settings = {"max_sampler_logp_difference": None, "max_steps": 6, "rollouts_ahead": ahead}
            trainer, recorder = run(family, server, tmp_path / str(ahead), learning_rate=0.0, **settings)
            bodies = server.sent_to("/inference/v1/generate")
            sent.append(sorted((body["token_ids"], body["content_parts"][0]["url"]) for body in bodies))
            assert len(recorder.rollouts) == 3
    assert sent[0] == sent[1] and len(sent[0]) == 3 * 2


@TEXT_FAMILY
class TestSurvival:
    def undisturbed(self, family, folder, **settings):
        with stub_server(family.build_model(seed=1).eval()) as server:
            return prompts_of(run(family, server, folder, **settings)[1])

    def test_a_server_that_dies_with_a_rollout_in_flight(self, family, server, tmp_path):
        """Each prompt is trained on once: before the loss, or after resuming."""
        expected = self.undisturbed(family, tmp_path / "whole", max_steps=8)
        server.held_from = 7  # the rollout that is requested at step 4

        def die():
            server.stop()
            server.broken_connections = 10**6

        first = Recorder()
        rollout = connect(server, tmp_path)
        trainer = trainer_on(family, tmp_path, rollout, [first, At(5, die)], max_steps=8)
        started = time.monotonic()
        with pytest.raises(SamplerLostError, match="(?s)failed 3 time.*step 6.*resume_from_checkpoint=True"):
            train_with_checkpoint(trainer)
        assert time.monotonic() - started < 60
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
        with stub_server(family.build_model(seed=1).eval()) as again:
            trainer, second = run(family, again, tmp_path, max_steps=8, resume=True)
        assert first.steps + second.steps == [0, 2, 4, 6]
        assert prompts_of(first) + prompts_of(second) == expected
        assert logged(trainer, "sampling/age")[-1] == 0

    def test_a_server_that_never_answers(self, family, server, tmp_path):
        server.held_from = 3
        rollout = connect(server, tmp_path, timeout=0.5, retries=1)
        with pytest.raises(SamplerLostError, match="(?s)no whole answer within 0.5 s.*checkpoint of step 2"):
            train_with_checkpoint(trainer_on(family, tmp_path, rollout))

    def test_a_server_that_forgets_its_weights_is_asked_again(self, family, server, tmp_path, caplog):
        expected = self.undisturbed(family, tmp_path / "whole")
        server.forgets_at = {6}  # within the third rollout
        trainer, recorder = run(family, server, tmp_path)
        assert logged(trainer, "sampling/age") == [0, 1, 0, 1, 1, 1]
        assert prompts_of(recorder) == expected

    @pytest.mark.parametrize("step", [3, 4])
    def test_a_signal_ends_the_run_at_once_and_the_rollout_is_asked_for_again(self, family, server, step, tmp_path):
        """In the middle of a rollout and at its end."""
        expected = self.undisturbed(family, tmp_path / "whole", max_steps=8)
        first, stop = Recorder(), StopOnSignal()
        held = At(step - 1, lambda: setattr(server, "held_from", len(server.asked_of) + 1))
        if step == 4:
            server.held_from = 7
        signalled = At(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        started = time.monotonic()
        callbacks = [first, signalled, stop, *([held] if step == 3 else [])]
        trainer = trainer_on(family, tmp_path, connect(server, tmp_path), callbacks, max_steps=8)
        trainer.train()
        assert stop.received == signal.SIGTERM and trainer.state.global_step in (step, step + 1)
        assert time.monotonic() - started < 240  # a held server answers after 300 s
        stopped_at = trainer.state.global_step
        server.held_from = 10**9
        server.release.set()
        _, second = run(family, server, tmp_path, max_steps=8, resume=True)
        assert first.steps + second.steps == [0, 2, 4, 6]
        assert prompts_of(first) + prompts_of(second) == expected
        assert newest_checkpoint(tmp_path) == tmp_path / f"checkpoint-{stopped_at}"
        assert not [thread for thread in threading.enumerate() if thread.name == "rollout-ahead"]

    def test_an_interrupted_run_leaves_no_thread_behind(self, family, server, tmp_path):
        server.held_from = 3

        def interrupt():
            raise KeyboardInterrupt

        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(family, server, tmp_path, [At(1, interrupt)])
        assert time.monotonic() - started < 240  # the server answers after 300 s
        names = {thread.name.rpartition("_")[0] or thread.name for thread in threading.enumerate()}
        assert "rollout-ahead" not in names and "ThreadPoolExecutor-0" not in names

    def test_an_error_of_the_request_reaches_the_user_as_itself(self, family, server, tmp_path):
        class Broken(Kept):
            def _respond(self, request, sampling, stop):
                if threading.current_thread() is not threading.main_thread() and self.requested[1:]:
                    return 1 // 0
                return super()._respond(request, sampling, stop)

        rollout = Broken(server.url, tmp_path / "weights")
        with pytest.raises(ZeroDivisionError) as caught:
            trainer_on(family, tmp_path, rollout).train()
        assert caught.traceback[-1].name == "_respond"

    def test_a_callback_that_samples_gets_the_present_policy(self, family, server, tmp_path):
        """The rollout in flight is not lost."""
        expected = self.undisturbed(family, tmp_path / "whole", max_steps=6, learning_rate=0.0)
        sampled = []

        class Curious(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    prompts = [[{"role": "user", "content": "Find it."}]]
                    sampled.append((trainer.rollout_func(prompts, trainer), server.weight_version))

        recorder = Recorder()
        rollout = connect(server, tmp_path)
        trainer = trainer_on(family, tmp_path, rollout, [recorder, Curious()], max_steps=6, learning_rate=0.0)
        trainer.train()
        ((output, version),) = sampled
        assert len(output["completion_ids"]) == 1 and version.startswith("policy-step-1-")
        assert prompts_of(recorder) == expected
        assert logged(trainer, "sampling/age") == [0, 1, 1]


@pytest.mark.slow
@TEXT_FAMILY
class TestTwoProcesses:
    def run(self, server, folder, *arguments):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["-m", "tests.vllm.two_processes", server.url, str(folder), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=400
        )
        return result, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]

    def test_each_requests_its_own_prompts(self, family, server, tmp_path):
        """If the policy does not move, each process gets the same responses as in a run that waits."""
        found = []
        for ahead in ("0", "1"):
            arguments = ("--ahead", ahead, "--learning-rate", "0")
            result, reports = self.run(server, tmp_path / ahead, *arguments)
            assert result.returncode == 0, result.stderr[-4000:]
            assert [report["world_size"] for report in reports] == [2, 2]
            found.append([(report["prompts"], report["tokens"]) for report in reports])
        assert found[0] == found[1] and found[0][0] != found[0][1]
        assert [report["sampled_at"] for report in reports] == [[0, 0, 1]] * 2

    def test_both_end_when_one_fails(self, family, server, tmp_path):
        result, reports = self.run(server, tmp_path, "--ahead", "1", "--lose-on-rank", "1")
        assert result.returncode != 0
        assert [report["error"] for report in reports] == ["SamplerLostError", "SamplerLostError"]
        assert "Process 1 failed" in reports[0]["message"]


@TEXT_FAMILY
class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "kwargs", "message"),
        [
            ({}, {"rollout_func": None}, "needs a sampler beside the trainer, got no `rollout_func`"),
            ({}, {"rollout_func": fixed_rollout(random_completions())}, "has no method `request`"),
            ({"use_vllm": True, "vllm_mode": "server"}, {}, 'vllm_mode="server"`: TRL asks .* NCCL'),
            ({"use_vllm": True, "vllm_mode": "colocate"}, {}, "vllm_mode='colocate'`: that engine"),
            ({"critic": "tree", "segmentation": "sequence", "beta": 0.0}, {}, "critic='tree'`: its continuations"),
            ({"critic": "monte_carlo"}, {}, "critic='monte_carlo'`: its continuations"),
            ({}, {"tools": [len]}, "cannot be combined with `tools`: a response of several turns"),
            ({}, {"environment_factory": dict}, "cannot be combined with `environment_factory`"),
            ({"rollouts_ahead": 2}, {}, r"`rollouts_ahead` must lie in \[0, 1\], got 2. Older"),
        ],
    )
    def test_with_the_reason(self, family, server, settings, kwargs, message, tmp_path):
        settings = {"advantage_estimator": "gae"} | settings if "critic" in settings else settings
        with pytest.raises(ValueError, match=message):
            trainer_on(family, tmp_path, connect(server, tmp_path), trainer_kwargs=kwargs, **settings)
