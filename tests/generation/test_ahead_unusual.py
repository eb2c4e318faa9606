"""One rollout ahead in unusual runs: trained twice, ended early, interrupted within a step, sampling rewards."""

import threading
import time

import pytest
import torch
from transformers import TrainerCallback

from tests.generation.test_ahead import At, connect, prompts_of, run, trainer_on
from tests.testing_utils import Recorder, logged, text_dataset
from tests.vllm.stub import stub_server


pytestmark = pytest.mark.parametrize("family", ["qwen2"], indirect=True)


@pytest.fixture
def server(family):
    with stub_server(family.build_model(seed=1).eval()) as stub:
        yield stub


class Ends(TrainerCallback):
    """Ends the epoch, or the training with a checkpoint, after some optimizer step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            setattr(control, f"should_{self.what}_stop", True)
            control.should_save = self.what == "training"


def assert_server_has(server, model):
    expected = model.state_dict()
    found = server.model.state_dict()
    assert found.keys() == expected.keys() and len(found) > 0
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


class TestOrder:
    @pytest.mark.parametrize("step", [3, 7])
    def test_an_epoch_that_a_callback_ends(self, family, server, step, tmp_path):
        """At step 7 a rollout of the next epoch is in flight already. The next epoch has an order of its own."""
        orders = []
        for ahead in (0, 1):
            settings = {"learning_rate": 0.0, "max_steps": 14, "rollouts_ahead": ahead}
            _, recorder = run(family, server, tmp_path / str(ahead), [Ends(step, "epoch")], **settings)
            orders.append((recorder.steps, prompts_of(recorder)))
        assert orders[0] == orders[1] and len(orders[0][0]) == (6 if step == 3 else 7)  # of two epochs
        prompts = orders[0][1]
        first_of_next = step // 2 + 1  # the rollout in progress is trained on to its end
        assert prompts[first_of_next] != prompts[0]

    def test_a_stream_that_is_resumed_after_its_first_pass(self, family, server, tmp_path):
        orders = []
        for ahead in (0, 1):
            folder, settings = tmp_path / str(ahead), {"learning_rate": 0.0, "max_steps": 22, "rollouts_ahead": ahead}
            for callbacks, resume in (([Ends(10, "training")], None), ([], True)):
                kwargs = {"train_dataset": text_dataset(8).to_iterable_dataset()}
                _, recorder = run(family, server, folder, callbacks, resume, trainer_kwargs=kwargs, **settings)
            orders.append((recorder.steps, prompts_of(recorder)))
        assert orders[0] == orders[1] and orders[0][0] == [10, 12, 14, 16, 18, 20]


class TestPresentWeights:
    @pytest.mark.parametrize("ahead", [0, 1])
    def test_a_second_training_begins_with_the_weights_of_the_first(self, family, server, ahead, tmp_path):
        """Its steps count from 0 again, and the first one sent weights before step 0, too."""
        trainer = trainer_on(
            family, tmp_path, connect(server, tmp_path), rollouts_ahead=ahead, max_steps=2 + 2 * ahead
        )
        trainer.train()
        assert_server_has(server, family.build_model())
        after_first = family.build_model()
        after_first.load_state_dict(trainer.model.state_dict())
        trainer.train()
        assert_server_has(server, after_first)
        assert logged(trainer, "sampling/sampling_logp_difference/mean")[0] < 1e-4

    def test_an_evaluation_of_the_best_checkpoint(self, family, server, tmp_path):
        """It is loaded after the last step, when the server has the last weights already."""
        settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
        settings |= {"save_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_at"}
        trainer = trainer_on(
            family,
            tmp_path,
            connect(server, tmp_path),
            trainer_kwargs={"eval_dataset": family.dataset(2)},
            per_device_eval_batch_size=2,
            greater_is_better=False,
            **settings,
        )
        evaluate = trainer.evaluate

        def with_step(*args, **kwargs):
            return {**evaluate(*args, **kwargs), "eval_at": trainer.state.global_step}

        trainer.evaluate = with_step
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
        evaluate()
        assert_server_has(server, trainer.model)
        assert logged(trainer, "eval_sampling/sampling_logp_difference/mean")[-1] < 1e-4


def test_a_reward_function_that_samples_leaves_the_rollout_in_flight_alone(family, server, tmp_path):
    recorder, judged = Recorder(), []

    def reward(completions, **kwargs):
        judged.append(trainer.rollout_func([[{"role": "user", "content": "Judge."}]], trainer))
        return [float(len(completion[0]["content"])) for completion in completions]

    kwargs = {"reward_funcs": reward, "callbacks": [recorder], "rollout_func": connect(server, tmp_path)}
    trainer = trainer_on(family, tmp_path, None, max_steps=6, trainer_kwargs=kwargs)
    trainer.train()
    assert [rollout.sampled_at for rollout in recorder.rollouts] == [0, 0, 2]
    assert len(judged) == 3 and len(server.asked_of) == 3 * 2 + 3  # no rollout is requested twice


def test_training_again_after_an_error_within_an_optimizer_step(family, server, tmp_path):
    """TRL goes on at the micro-batch where it stopped, so rollouts begin in the middle of optimizer steps."""

    class Fails(TrainerCallback):
        is_first = True

        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1 and self.is_first:
                self.is_first = False
                raise RuntimeError("as ordered")

    recorder, settings = Recorder(), {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    rollout = connect(server, tmp_path)
    trainer = trainer_on(family, tmp_path, rollout, [recorder, Fails()], max_steps=8, **settings)
    with pytest.raises(RuntimeError, match="as ordered"):
        trainer.train()
    server.asked_of.clear()
    recorder.rollouts.clear()
    trainer.train()
    assert [rollout.sampled_at for rollout in recorder.rollouts] == [0, 0, 2, 4]
    assert len(server.asked_of) == 4 * 2


def test_a_run_ends_at_once_while_the_server_keeps_its_caches(family, server, tmp_path):
    """The request in flight waits for the next attempt then."""
    rollout = connect(server, tmp_path, backoff=20.0)
    started = []

    def busy():
        server.is_busy = 10**6

    def interrupt():
        while server.is_busy == 10**6:
            time.sleep(0.01)
        time.sleep(0.2)
        started.append(time.monotonic())
        raise KeyboardInterrupt

    trainer = trainer_on(family, tmp_path, rollout, [At(1, busy), At(3, interrupt)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert time.monotonic() - started[0] < 3
    assert "rollout-ahead" not in {thread.name for thread in threading.enumerate()}
