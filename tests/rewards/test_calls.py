"""Reward functions that fail, hang, or return what is no reward."""

import asyncio
import functools
import sys
import threading
import time

import pytest
import torch
from trl.trainer.utils import shutdown_event_loop_in_daemon, start_event_loop_in_daemon

from sapo_trl import rewards
from sapo_trl.rewards.calls import MAX_TIMEOUTS_IN_A_ROW, checked_reward, checked_rewards
from tests.testing_utils import Recorder, length_reward, logged, sapo_trainer


COMPLETIONS = ["a", "b", "c"]
TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)


def fails_on(bad: str):
    def score(completions, answer, note, **kwargs):
        if bad in completions:
            raise ZeroDivisionError(f"cannot score {bad}")
        assert len(answer) == len(completions) and note == "same for all"
        return [float(ord(completion) + number) for completion, number in zip(completions, answer, strict=True)]

    return score


class TestCalls:
    def test_right_rewards_pass_unchanged(self):
        def score(completions, **kwargs):
            return (x for x in [1.0, None, 3])

        wrapped = checked_reward(score)
        assert wrapped(completions=COMPLETIONS) == [1.0, None, 3]
        assert wrapped.__name__ == "score"

    @pytest.mark.parametrize("rewards", [[1.0], [1.0] * 4, []])
    def test_wrong_number(self, rewards):
        calls = []

        def score(completions, **kwargs):
            calls.append(completions)
            return rewards

        with pytest.raises(ValueError, match=f"`score` returned {len(rewards)} rewards for 3 completions"):
            checked_reward(score)(completions=COMPLETIONS)
        assert len(calls) == 1  # a mistake that no repetition mends

    @pytest.mark.parametrize("value", [float("inf"), -float("inf"), torch.tensor(float("inf"))])
    def test_infinite(self, value):
        def score(completions, **kwargs):
            return [0.0, value, 0.0]

        with pytest.raises(ValueError, match=f"`score` returned {float(value)} for completion 1 of 3.*`None`"):
            checked_reward(score)(completions=COMPLETIONS)

    def test_partials_and_instances_keep_a_name(self):
        class Scorer:
            def __call__(self, completions, **kwargs):
                return [1.0]

        with pytest.raises(ValueError, match="`Scorer` returned 1 rewards"):
            checked_reward(Scorer())(completions=COMPLETIONS)
        partial = checked_reward(functools.partial(length_reward, scale=2))
        assert partial.__name__ == "length_reward"

    def test_what_passes_unchanged_and_what_does_not_pass(self):
        model = torch.nn.Linear(1, 1)
        assert checked_rewards(None) is None
        assert checked_rewards("model/id") == "model/id"
        wrapped = checked_rewards([model, "model/id", length_reward])
        assert wrapped[:2] == [model, "model/id"] and wrapped[2].__name__ == "length_reward"
        with pytest.raises(TypeError, match="callables, models or model ids, got int"):
            checked_rewards([3])


class TestFailures:
    ROW = {"completions": COMPLETIONS, "answer": [1, 2, 3], "note": "same for all"}

    def test_one_completion_costs_the_others_nothing(self):
        shares = {}
        rewards = checked_reward(fails_on("b"))(**self.ROW, log_metric=shares.__setitem__)
        assert rewards == [ord("a") + 1, None, ord("c") + 3]
        assert shares == {"rewards/score/failed": pytest.approx(1 / 3)}

    def test_the_same_of_an_async_function(self):
        score = fails_on("b")

        async def async_score(completions, **kwargs):
            await asyncio.sleep(0)
            return score(completions=completions, **kwargs)

        shares = {}
        rewards = asyncio.run(checked_reward(async_score)(**self.ROW, log_metric=shares.__setitem__))
        assert rewards == [ord("a") + 1, None, ord("c") + 3]
        assert shares == {"rewards/async_score/failed": pytest.approx(1 / 3)}

    def test_nan_is_no_reward(self):
        shares = {}
        score = checked_reward(lambda completions, **kwargs: [1.0, float("nan"), torch.tensor(torch.nan)])
        assert score(completions=COMPLETIONS, log_metric=shares.__setitem__) == [1.0, None, None]
        assert list(shares.values()) == [pytest.approx(2 / 3)]

    def test_failing_for_all_is_an_error_with_its_cause(self):
        def score(completions, **kwargs):
            raise ZeroDivisionError("always")

        with pytest.raises(RuntimeError, match=r"`score` failed for all 3 completions: ZeroDivisionError") as raised:
            checked_reward(score)(completions=COMPLETIONS)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)

    def test_a_function_that_hangs(self):
        def score(completions, **kwargs):
            if "b" in completions:
                time.sleep(30)
            return [1.0] * len(completions)

        started = time.perf_counter()
        assert checked_reward(score, timeout=0.2)(completions=COMPLETIONS) == [1.0, None, 1.0]
        assert time.perf_counter() - started < 5

    def test_an_async_function_that_hangs(self):
        async def score(completions, **kwargs):
            if "b" in completions:
                await asyncio.sleep(30)
            return [1.0] * len(completions)

        assert asyncio.run(checked_reward(score, timeout=0.2)(completions=COMPLETIONS)) == [1.0, None, 1.0]

    def test_one_that_always_hangs_is_given_up(self):
        calls = []

        def score(completions, **kwargs):
            calls.append(completions)
            time.sleep(30)

        with pytest.raises(RuntimeError, match="failed for all 20 completions: TimeoutError"):
            checked_reward(score, timeout=0.1)(completions=["a"] * 20)
        assert len(calls) == 1 + MAX_TIMEOUTS_IN_A_ROW

    def test_a_generator_that_hangs(self):
        """It returns at once, and works when its rewards are taken out."""

        def score(completions, **kwargs):
            for completion in completions:
                time.sleep(30 if completion == "b" else 0)
                yield 1.0

        started = time.perf_counter()
        assert checked_reward(score, timeout=0.2)(completions=COMPLETIONS) == [1.0, None, 1.0]
        assert time.perf_counter() - started < 5

    def test_an_async_function_that_blocks(self, monkeypatch):
        """Nothing of asyncio's can end it, and what runs beside it on the same loop is not to suffer."""
        monkeypatch.setattr(rewards.calls, "LOOP_ANSWERS_WITHIN", 0.2)

        async def blocks(completions, **kwargs):
            if "b" in completions:
                time.sleep(30)
            return [1.0] * len(completions)

        async def waits(completions, **kwargs):
            await asyncio.sleep(0.05)
            return [2.0] * len(completions)

        async def together():
            functions = (checked_reward(blocks, timeout=0.4), checked_reward(waits, timeout=0.4))
            return await asyncio.gather(*(function(completions=COMPLETIONS) for function in functions))

        started = time.perf_counter()
        assert asyncio.run(together()) == [[1.0, None, 1.0], [2.0, 2.0, 2.0]]
        assert time.perf_counter() - started < 10

    def test_async_work_that_only_fits_one_by_one(self):
        """Each completion takes less than the limit, but they hold one another up."""

        async def score(completions, **kwargs):
            for _ in completions:
                time.sleep(0.15)
            return [1.0] * len(completions)

        assert asyncio.run(checked_reward(score, timeout=0.25)(completions=["a"] * 4)) == [1.0] * 4

    def test_an_async_function_that_always_blocks_is_given_up(self, monkeypatch):
        monkeypatch.setattr(rewards.calls, "LOOP_ANSWERS_WITHIN", 0.2)
        calls = []

        async def score(completions, **kwargs):
            calls.append(completions)
            time.sleep(30)

        with pytest.raises(RuntimeError, match="failed for all 20 completions: .*did not return within 0.1 s"):
            asyncio.run(checked_reward(score, timeout=0.1)(completions=["a"] * 20))
        assert len(calls) == 1 + MAX_TIMEOUTS_IN_A_ROW

    @pytest.mark.parametrize("timeout", [None, 5.0])
    def test_sys_exit_is_a_failure_like_any_other(self, timeout):
        def score(completions, **kwargs):
            if "b" in completions:
                sys.exit()
            return [1.0] * len(completions)

        assert checked_reward(score, timeout)(completions=COMPLETIONS) == [1.0, None, 1.0]
        with pytest.raises(RuntimeError, match=r"called sys\.exit\(None\)"):
            checked_reward(score, timeout)(completions=["b"])

    @pytest.mark.parametrize("timeout", [None, 5.0])
    @pytest.mark.parametrize("ending", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
    @pytest.mark.parametrize("inside", [False, True], ids=["itself", "a task of its own"])
    def test_nor_does_one_in_an_async_function_end_the_loop_that_waits_for_it(self, timeout, ending, inside):
        """As TRL waits: for a loop on another thread, without a limit."""

        async def one(completion):
            await asyncio.sleep(0)
            if completion == "b":
                raise ending
            return 1.0

        async def score(completions, **kwargs):
            if inside:
                return await asyncio.gather(*map(one, completions))
            return [await one(completion) for completion in completions]

        thread, loop, _ = start_event_loop_in_daemon()
        wrapped = checked_reward(score, timeout)
        for _ in range(2):
            result = asyncio.run_coroutine_threadsafe(wrapped(completions=COMPLETIONS), loop).result(timeout=20)
            assert result == [1.0, None, 1.0]
        shutdown_event_loop_in_daemon(thread, loop)

    def test_one_that_stops_its_loop_is_a_failure_and_no_thread_dies_of_it(self, monkeypatch):
        died = []
        monkeypatch.setattr(threading, "excepthook", died.append)

        async def score(completions, **kwargs):
            if "b" in completions:
                asyncio.get_running_loop().stop()
                await asyncio.sleep(0.1)
            return [1.0] * len(completions)

        assert asyncio.run(checked_reward(score, 5)(completions=COMPLETIONS)) == [1.0, None, 1.0]
        assert not died

    def test_async_functions_keep_one_loop(self):
        """What they have opened on it (connections) stays open, from call to call and from one to another."""
        loops = []

        async def score(completions, **kwargs):
            loops.append(asyncio.get_running_loop())
            return [1.0] * len(completions)

        for timeout in (None, 5.0):
            for _ in range(2):
                asyncio.run(checked_reward(score, timeout)(completions=COMPLETIONS))
        assert len(loops) == 4 and len(set(map(id, loops))) == 1

    def test_their_own_timeout_is_their_own_error(self):
        async def score(completions, **kwargs):
            if "b" in completions:
                raise TimeoutError("the service is slow")
            return [1.0] * len(completions)

        wrapped = checked_reward(score)
        assert asyncio.run(wrapped(completions=COMPLETIONS)) == [1.0, None, 1.0]
        with pytest.raises(TimeoutError, match="the service is slow"):
            asyncio.run(wrapped(completions=["b"]))

    def test_without_timeout_it_runs_in_the_calling_thread(self):
        import threading

        seen = []
        checked_reward(lambda completions, **kwargs: seen.append(threading.current_thread()) or [1.0] * 3)(
            completions=COMPLETIONS
        )
        assert seen == [threading.current_thread()]


class TestInTheTrainer:
    @TEXT_FAMILY
    @pytest.mark.parametrize("kind", ["synchronous", "asynchronous"])
    def test_sys_exit_does_not_end_training_as_if_all_were_well(self, family, kind, tmp_path):
        def score(completions, **kwargs):
            sys.exit(0)

        async def async_score(completions, **kwargs):
            sys.exit(0)

        reward = score if kind == "synchronous" else async_score
        trainer = sapo_trainer(family, tmp_path, max_steps=1, trainer_kwargs={"reward_funcs": reward})
        with pytest.raises(RuntimeError, match=r"score` failed for all .* completions: .*called sys\.exit\(0\)"):
            trainer.train()

    @TEXT_FAMILY
    @pytest.mark.parametrize("timeout", [None, 5.0])
    def test_failed_rows_carry_no_gradient_and_are_counted(self, family, timeout, tmp_path):
        def score(completion_ids, **kwargs):
            if any(ids[0] % 2 for ids in completion_ids):
                raise ValueError("odd")
            return [1.0] * len(completion_ids)

        recorder = Recorder()
        trainer = sapo_trainer(
            family,
            tmp_path,
            max_steps=4,
            per_device_train_batch_size=4,
            reward_timeout=timeout,
            trainer_kwargs={"reward_funcs": score, "callbacks": [recorder]},
        )
        trainer.train()
        for rollout, share in zip(recorder.rollouts, logged(trainer, "rewards/score/failed"), strict=True):
            odd = rollout.completion_ids[:, 0] % 2 == 1
            assert 0 < odd.sum() < len(odd) and share == pytest.approx(odd.float().mean().item())
            assert torch.equal(rollout.rewards.isnan(), odd)
            assert rollout.segments.mask[odd].sum() == 0
            assert rollout.segments.mask[~odd].any(dim=1).all()
