"""Scoring in worker processes: what no answer, no signal and no fork may break."""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from sapo_trl.rewards import accuracy_reward, equivalence, worker_pool
from sapo_trl.rewards.equivalence import Verdict, are_equivalent, configure_scoring, is_equivalent, scoring_counts
from sapo_trl.rewards.worker_pool import WorkerPool


# Nothing of these is decided without a worker.
RIGHT, WRONG, GOLD = r"\frac{12}{2}\sqrt{3}", r"5\sqrt{3}", r"6\sqrt{3}"
BOMB = r"9^{9^{9^9}}"
ENDLESS = r"\text{endless}"


def endless_program(folder: Path) -> Path:
    """A worker that computes without an end, in C, when [`ENDLESS`] comes; the judge itself does so for no answer."""
    source = worker_pool._PROGRAM.read_text(encoding="utf-8")
    call = "verdict = judge(*json.loads(request))"
    assert source.count(call) == 1
    program = folder / "worker.py"
    program.write_text(source.replace(call, f"verdict = 9**9**9**9 if 'endless' in request else {call[10:]}"), "utf-8")
    return program


@pytest.fixture
def endless(monkeypatch, tmp_path):
    monkeypatch.setattr("sapo_trl.rewards.worker_pool._PROGRAM", endless_program(tmp_path))


def wait_until(condition, seconds: float = 60.0) -> float:
    started = time.perf_counter()
    while not condition():
        assert time.perf_counter() - started < seconds
        time.sleep(0.01)
    return time.perf_counter() - started


def child_ids() -> set[int]:
    """Processes below this one, zombies included."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture
def pool():
    before = child_ids()
    pool = WorkerPool(num_workers=1, timeout=2.0)
    yield pool
    pool.close()
    assert child_ids() <= before


@pytest.fixture
def fresh():
    """Nothing compared before, and the defaults afterwards."""
    configure_scoring()
    yield
    configure_scoring()


class TestLimits:
    @pytest.mark.parametrize(
        "bomb",
        [
            BOMB,
            r"\sum_{k=1}^{10^{10}} \frac{1}{k}",
            r"10^{10^{10}}!",
            "1000000!!!",
            "2^{2^{2^{2^{2^{2}}}}}",
            r"\tan(10^{10^{5}})",
            r"\binom{10^9}{10^8}",
            r"(x+1)^{1000000}",
            "x!" * 180,
            "{" * 900 + "1" + "}" * 900,
            r"\underbrace{" * 100 + "1" + "}" * 100,
            "1." + "3" * 1800 + "...",
        ],
        ids=lambda bomb: bomb[:20],
    )
    def test_bombs_take_no_time_and_are_not_right(self, bomb, pool):
        assert pool.compare(RIGHT, GOLD) == "equal"
        worker = psutil.Process(pool.processes()[0])
        before = worker.cpu_times().user
        assert pool.compare(bomb, r"\sqrt{2} + x") != "equal"
        assert pool.compare(bomb, r"\sqrt{2}") != "equal"
        assert worker.cpu_times().user - before < 1.0

    def test_a_worker_out_of_time_is_replaced(self, endless):
        # One power of integers, in C: a signal handler of Python's would wait for its end.
        pool = WorkerPool(num_workers=1, timeout=0.3)
        try:
            assert pool.compare(ENDLESS, r"\sqrt{2}") is None
            assert pool.compare("2", "2.0") == "equal"
        finally:
            pool.close()

    def test_a_worker_that_sleeps_loses_no_time(self, pool):
        assert pool.compare(RIGHT, GOLD) == "equal"
        process = psutil.Process(pool.processes()[0])
        process.suspend()
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(pool.compare, WRONG, GOLD)
            time.sleep(2.5)  # longer than the limit
            assert not future.done()
            process.resume()
            assert future.result() == "different"

    def test_a_silent_worker_is_given_up(self, pool, monkeypatch):
        monkeypatch.setattr("sapo_trl.rewards.worker_pool._PATIENCE", 0)
        monkeypatch.setattr(pool._workers[0], "timeout", 60.0)
        assert pool.compare(RIGHT, GOLD) == "equal"
        first = pool.processes()[0]
        monkeypatch.setattr(pool._workers[0], "timeout", 0.5)
        os.kill(first, signal.SIGSTOP)
        assert pool.compare(WRONG, GOLD) is None
        assert not psutil.pid_exists(first)

    def test_memory(self):
        pool = WorkerPool(num_workers=1, timeout=30.0, memory_bytes=256 << 20)
        try:
            assert pool.compare(RIGHT, GOLD) == "equal"
            process = psutil.Process(pool.processes()[0])
            assert process.rlimit(psutil.RLIMIT_AS)[0] == 256 << 20
            assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
            assert pool.compare(RIGHT, GOLD) == "equal"
        finally:
            pool.close()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_workers": 0}, "`num_workers` must be at least 1, got 0"),
            ({"timeout": 0.0}, "`timeout` must be a finite number of seconds above 0, got 0.0"),
            ({"timeout": float("nan")}, "`timeout` must be a finite"),
            ({"memory_bytes": 1000}, "`memory_bytes` must leave room for Python, 256 MiB .* got 1000"),
        ],
    )
    def test_settings_are_checked(self, settings, message):
        with pytest.raises(ValueError, match=message):
            configure_scoring(**settings)


class TestDeaths:
    def test_killed_between_comparisons(self, pool):
        assert pool.compare(RIGHT, GOLD) == "equal"
        first = pool.processes()[0]
        os.kill(first, signal.SIGKILL)
        assert pool.compare(WRONG, GOLD) == "different"
        assert pool.processes() != [first] and not psutil.pid_exists(first)

    def test_killed_while_it_compares(self, pool):
        assert pool.compare(RIGHT, GOLD) == "equal"
        first = pool.processes()[0]
        os.kill(first, signal.SIGSTOP)  # so that the comparison is sure to be under way
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(pool.compare, WRONG, GOLD)
            time.sleep(0.2)
            os.kill(first, signal.SIGKILL)
            assert future.result(timeout=120) == "different"

    def test_an_answer_that_crashes_its_worker_is_tried_once_more(self, pool, monkeypatch, tmp_path):
        program, starts = tmp_path / "worker.py", tmp_path / "starts"
        program.write_text(
            f"import os\nopen({str(starts)!r}, 'a').write('.')\nprint('\"ready\"', flush=True)\ninput()\nos.abort()\n",
            encoding="utf-8",
        )
        monkeypatch.setattr("sapo_trl.rewards.worker_pool._PROGRAM", program)
        assert pool.compare(RIGHT, GOLD) is None
        assert starts.read_text(encoding="utf-8") == ".."

    def test_a_worker_is_replaced_after_many_comparisons(self, pool, monkeypatch, tmp_path):
        program = tmp_path / "worker.py"
        source = worker_pool._PROGRAM.read_text(encoding="utf-8")
        assert source.count("MAX_COMPARISONS = 10_000") == 1
        program.write_text(source.replace("MAX_COMPARISONS = 10_000", "MAX_COMPARISONS = 2"), encoding="utf-8")
        monkeypatch.setattr("sapo_trl.rewards.worker_pool._PROGRAM", program)
        seen = set()
        for _ in range(5):
            assert pool.compare("1+1", "2") == "equal"
            seen.update(pool.processes())
        assert len(seen) == 3

    def test_an_interrupted_comparison_gives_no_reply_to_the_next(self, pool):
        """As Ctrl-C would."""

        class Interrupt(BaseException):
            pass

        def interrupt(signum, frame):
            raise Interrupt

        assert pool.compare(RIGHT, GOLD) == "equal"
        os.kill(pool.processes()[0], signal.SIGSTOP)
        old = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(Interrupt):
                pool.compare(RIGHT, GOLD)
        finally:
            signal.signal(signal.SIGALRM, old)
        assert pool.processes() == []
        assert pool.compare(WRONG, GOLD) == "different"

    def test_a_worker_that_cannot_start_is_an_error_that_says_why(self, pool, monkeypatch, tmp_path):
        (tmp_path / "mpmath.py").write_text("raise ImportError('mpmath is broken')", encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(RuntimeError, match="did not start: ImportError: mpmath is broken"):
            pool.compare(RIGHT, GOLD)
        monkeypatch.undo()
        assert pool.compare(RIGHT, GOLD) == "equal"


# A program that has one worker and prints its id. It loads nothing but the pool, and so starts quickly.
PARENT = f"""
import importlib.util, os, sys, threading, time
spec = importlib.util.spec_from_file_location("worker_pool", {worker_pool.__file__!r})
worker_pool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker_pool)
pool = worker_pool.WorkerPool(num_workers=1, timeout=600.0)
assert pool.compare("1+1", "2") == "equal"
print(*pool.processes(), flush=True)
"""


class TestParents:
    def start(self, then: str, **options) -> tuple[subprocess.Popen, int]:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT + textwrap.dedent(then)], stdout=subprocess.PIPE, text=True, **options
        )
        return parent, int(parent.stdout.readline())

    def test_an_idle_worker_ends_with_a_killed_parent(self):
        parent, worker = self.start("time.sleep(600)")
        assert psutil.pid_exists(worker)
        parent.kill()
        parent.wait()
        assert wait_until(lambda: not psutil.pid_exists(worker)) < 1.0 + 4.0 * load()

    def test_a_computing_worker_ends_with_a_killed_parent(self, tmp_path):
        parent, worker = self.start(
            f"""
            worker_pool._PROGRAM = {str(endless_program(tmp_path))!r}
            pool = worker_pool.WorkerPool(num_workers=1, timeout=600.0)
            pool.compare("1+1", "2")
            print(*pool.processes(), flush=True)
            pool.compare({ENDLESS!r}, "1+1")
            """
        )
        worker = int(parent.stdout.readline())
        before = psutil.Process(worker).cpu_times().user
        wait_until(lambda: psutil.Process(worker).cpu_times().user > before + 0.5)
        parent.kill()
        parent.wait()
        assert wait_until(lambda: not psutil.pid_exists(worker)) < 1.0 + 4.0 * load()

    def test_a_worker_ends_though_a_forked_child_lives_on(self):
        parent, worker = self.start(
            """
            if os.fork() == 0:
                pool.forget()
                print(os.getpid(), flush=True)
            time.sleep(600)
            """
        )
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        try:
            wait_until(lambda: not psutil.pid_exists(worker))
            assert psutil.pid_exists(child)
        finally:
            os.kill(child, signal.SIGKILL)

    def test_nothing_is_left_at_a_normal_end(self):
        parent, worker = self.start("")
        assert parent.wait() == 0
        wait_until(lambda: not psutil.pid_exists(worker))

    def test_ctrl_c_spares_workers(self):
        parent, worker = self.start(
            """
            import signal
            seen = []
            signal.signal(signal.SIGINT, lambda *_: seen.append(True))
            print("armed", flush=True)
            while not seen:
                time.sleep(0.01)
            print(pool.compare("1+2", "3"), *pool.processes())
            """,
            process_group=0,
        )
        assert parent.stdout.readline() == "armed\n"
        os.killpg(parent.pid, signal.SIGINT)  # what a terminal does
        assert parent.communicate()[0] == f"equal {worker}\n"

    def test_a_forked_child_has_workers_of_its_own(self, fresh):
        assert is_equivalent(RIGHT, GOLD)
        mine = equivalence._pool.processes()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            verdicts = are_equivalent([r"\frac{18}{3}\sqrt{3}", WRONG], [GOLD, GOLD])
            os.write(write, pickle.dumps((verdicts, equivalence._pool.processes())))
            equivalence._pool.close()
            os._exit(0)
        os.waitpid(child, 0)
        verdicts, theirs = pickle.loads(os.read(read, 65536))
        assert verdicts == [Verdict.EQUAL, Verdict.DIFFERENT]
        assert mine and theirs and not set(mine) & set(theirs)
        # And the parent's is as it was.
        assert is_equivalent(r"\frac{24}{4}\sqrt{3}", GOLD) and equivalence._pool.processes()[:1] == mine[:1]
        assert not any(psutil.pid_exists(pid) for pid in theirs)


def load() -> float:
    """How many processes wait for a core: allowances grow with it."""
    return os.getloadavg()[0] / os.cpu_count()


class TestCallers:
    def test_threads(self, fresh):
        completions = [rf"\boxed{{\frac{{{6 * k}}}{{{k}}}\sqrt{{{3 + k % 2}}}}}" for k in range(2, 10)]

        def compute(_):
            return accuracy_reward(completions=completions, answer=[GOLD] * len(completions))

        with ThreadPoolExecutor(4) as threads:
            rewards = list(threads.map(compute, range(4)))
        assert rewards == [[1.0, 0.0] * 4] * 4

    def test_event_loop(self, fresh):
        async def both():
            in_loop = accuracy_reward(completions=[rf"\boxed{{{RIGHT}}}"], answer=[GOLD])
            in_thread = await asyncio.to_thread(accuracy_reward, completions=[rf"\boxed{{{WRONG}}}"], answer=[GOLD])
            return in_loop + in_thread

        assert asyncio.run(both()) == [1.0, 0.0]

    def test_a_batch_uses_all_workers_and_keeps_its_order(self, fresh):
        answers = [rf"{k}\sqrt{{3}}" for k in range(1, 13)]
        verdicts = are_equivalent(answers, [r"\sqrt{108}"] * 12)
        assert [k for k, verdict in enumerate(verdicts, start=1) if verdict is Verdict.EQUAL] == [6]
        assert len(equivalence._pool.processes()) == 2

    def test_what_is_decided_at_sight_starts_no_process(self, fresh):
        pairs = [
            ("12", "12"),
            ("12", "13"),
            ("1.5", "1.50"),
            (r"6 \sqrt { 3 }", r"6\sqrt{3}"),
            ("", "1"),
            ("yes", "Yes"),
        ]
        answers, golds = zip(*pairs, strict=True)
        verdicts = are_equivalent(answers, golds)
        assert verdicts == ["equal", "different", "equal", "equal", "unparsed", "equal"]
        assert equivalence._pool.processes() == []

    def test_repeated_pairs_are_compared_once(self, fresh, endless):
        configure_scoring(timeout=0.5)
        verdicts = are_equivalent([ENDLESS] * 50, ["2"] * 50)
        started = time.perf_counter()
        assert verdicts == are_equivalent([ENDLESS] * 50, ["2"] * 50) == [Verdict.TIMED_OUT] * 50
        assert time.perf_counter() - started < 0.5  # the limit: it was not tried again

    def test_counts(self, fresh, endless):
        configure_scoring(timeout=0.5)
        before = scoring_counts()
        are_equivalent(["1", "2", r"\frac{", ENDLESS], ["1", "3", "2", "2"])
        after = scoring_counts()
        assert {verdict: after[verdict] - before[verdict] for verdict in Verdict} == dict.fromkeys(Verdict, 1)

    def test_numbers_of_answers_and_golds_must_match(self):
        with pytest.raises(ValueError, match="2 answers came with 1 gold"):
            are_equivalent(["1", "2"], ["1"])
