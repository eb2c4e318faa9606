"""The judge, against an endpoint of the OpenAI form on this machine."""

import contextlib
import io
import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from rich.console import Console

from sapo_trl.evaluation.benchmark import Problem, Score
from sapo_trl.evaluation.judge import RESPONSE_CHARACTERS, Judge, JudgeError
from sapo_trl.evaluation.scoring import score_run
from sapo_trl.evaluation.settings import EvalArguments
from sapo_trl.evaluation.store import GenerationStore
from sapo_trl.evaluation.tables import make_tables
from tests.evaluation.evaluation_run import TEXT


class Endpoint:
    """Finds an answer right if the response has the word `right`; what goes wrong first is in `failures`."""

    def __init__(self):
        self.failures = []
        self.asked = []
        self.headers = []
        self.whole = None
        self.drips = False
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.asked.append(payload)
                    endpoint.headers.append((self.path, dict(self.headers)))
                    failure = endpoint.failures.pop(0) if endpoint.failures else None
                if failure == "hang up":
                    self.close_connection = True
                    return
                content = json.loads(payload["messages"][1]["content"])
                verdict = "right" in content["response"]
                text = 'It could be {"correct": false}. ' * verdict + json.dumps({"correct": verdict})
                if isinstance(failure, str):
                    text = failure
                body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
                body = body if endpoint.whole is None else endpoint.whole.encode()
                status = failure if isinstance(failure, int) else 200
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    while endpoint.drips:
                        self.wfile.write(b" ")
                        time.sleep(0.05)
                    self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def judge(endpoint, folder, **settings):
    settings = {"judge_url": endpoint.url, "judge_model": "grader-1", "judge_retries": 2, **settings}
    return Judge(EvalArguments(model="m", **settings), folder, backoff=0.01)


def problem(name="q"):
    return Problem(name, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1 + 1?"}]}], "2")


def test_what_the_judge_is_shown(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-7")
    samples = [(problem(), "x" * 5000 + "the right end"), (problem(), "no")]
    assert judge(endpoint, tmp_path, judge_key_env="MY_KEY", judge_workers=1).verdicts(samples) == [True, False]
    path, headers = endpoint.headers[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-7"
    assert endpoint.asked[0]["model"] == "grader-1" and endpoint.asked[0]["temperature"] == 0.0
    content = json.loads(endpoint.asked[0]["messages"][1]["content"])
    assert content["question"] == "1 + 1?" and content["reference"] == "2"
    assert content["response"].endswith("the right end") and len(content["response"]) == RESPONSE_CHARACTERS
    assert "secret-7" not in (tmp_path / "verdicts.jsonl").read_text()


def test_verdicts_are_remembered_by_question_and_model(endpoint, tmp_path):
    samples = [(problem(), f"right {i}") for i in range(20)]
    assert judge(endpoint, tmp_path).verdicts(samples) == [True] * 20
    assert len(endpoint.asked) == 20
    (tmp_path / "verdicts.jsonl").open("a").write('{"key": "torn')
    steps = []
    assert judge(endpoint, tmp_path).verdicts(samples, lambda: steps.append(1)) == [True] * 20
    assert len(endpoint.asked) == 20 and len(steps) == 20
    judge(endpoint, tmp_path, judge_model="grader-2").verdicts(samples[:1])
    assert len(endpoint.asked) == 21
    assert len(judge(endpoint, tmp_path)._verdicts) == 21  # the torn line has spoiled none


@pytest.mark.parametrize("failure", [500, 503, 429, "hang up"])
def test_what_passes_is_tried_again(endpoint, tmp_path, failure):
    endpoint.failures = [failure, failure]
    assert judge(endpoint, tmp_path).verdicts([(problem(), "right")]) == [True]
    assert len(endpoint.asked) == 3


def test_an_endpoint_that_stays_away_is_an_error_and_its_verdicts_stay(endpoint, tmp_path):
    endpoint.failures = [None, 500, 500, 500]
    samples = [(problem(), "right 1"), (problem(), "right 2")]
    with pytest.raises(JudgeError, match=r"failed 3 time\(s\), at last with: 500"):
        judge(endpoint, tmp_path, judge_workers=1).verdicts(samples)
    asked = len(endpoint.asked)
    assert judge(endpoint, tmp_path).verdicts(samples) == [True, True]
    assert len(endpoint.asked) == asked + 1


@pytest.mark.parametrize(("status", "asked"), [(401, 1), (404, 1), (302, 1)])
def test_a_refused_key_a_missing_model_and_a_redirect_end_it_at_once(endpoint, tmp_path, status, asked):
    endpoint.failures = [status]
    with pytest.raises(JudgeError, match=f"was refused: {status}"):
        judge(endpoint, tmp_path).verdicts([(problem(), "right")])
    assert len(endpoint.asked) == asked


def test_one_question_that_is_refused_or_answered_oddly_has_no_verdict(endpoint, tmp_path):
    endpoint.failures = [400, "I cannot say."]
    samples = [(problem(), "right 1"), (problem(), "right 2"), (problem(), "right 3")]
    assert judge(endpoint, tmp_path, judge_workers=1).verdicts(samples) == [None, None, True]


def test_an_endpoint_that_refuses_everything_is_an_error(endpoint, tmp_path):
    endpoint.failures = [400, 422]
    with pytest.raises(JudgeError, match="no verdict on any answer; it said '.* 4"):
        judge(endpoint, tmp_path).verdicts([(problem(), "right 1"), (problem(), "right 2")])


@pytest.mark.parametrize("line", ['{"key": 1, "correct": true}', '{"key": "k", "correct": "no"}', "[1]", "[" * 99_999])
def test_what_is_no_verdict_in_the_file_is_passed_over(endpoint, tmp_path, line):
    (tmp_path / "verdicts.jsonl").write_text(line + "\n")
    assert judge(endpoint, tmp_path)._verdicts == {}
    assert judge(endpoint, tmp_path).verdicts([(problem(), "right")]) == [True]


@pytest.mark.parametrize("answer", ["[]", "3", '{"choices": []}', '{"choices": [{"message": {"content": [1]}}]}'])
def test_an_endpoint_of_another_kind(endpoint, tmp_path, monkeypatch, answer):
    monkeypatch.setattr(endpoint, "whole", answer)
    with pytest.raises(JudgeError, match="does not answer like a chat endpoint"):
        judge(endpoint, tmp_path).verdicts([(problem(), "right")])


def test_an_endpoint_that_never_ends_its_answer(endpoint, tmp_path, monkeypatch):
    """A byte every now and then is no answer, however long one listens."""
    monkeypatch.setattr(endpoint, "drips", True)
    started = time.monotonic()
    with pytest.raises(JudgeError, match="no whole answer within 0.4 s"):
        judge(endpoint, tmp_path, judge_timeout=0.4, judge_retries=0).verdicts([(problem(), "right")])
    assert time.monotonic() - started < 3


def test_an_endpoint_that_is_none(tmp_path):
    settings = {"judge_url": "http://127.0.0.1:9/v1", "judge_model": "m", "judge_retries": 1, "judge_timeout": 5.0}
    with pytest.raises(JudgeError, match=r"judge_url='http://127.0.0.1:9/v1': .* failed 2 time"):
        Judge(EvalArguments(model="m", **settings), tmp_path, backoff=0.01).verdicts([(problem(), "x")])


@pytest.fixture
def store(tmp_path):
    """Four generations: boxed right, boxed wrong but called right, wrong, and without any answer."""
    texts = [r"\boxed{2}", r"the right one, \boxed{two}", r"\boxed{3}", "hm"]
    store = GenerationStore(tmp_path)
    rows = [
        {"row": i, "id": f"q{i}", "generation": 0, "seed": i, "text": text, "tokens": 4, "finish_reason": "stop"}
        for i, text in enumerate(texts)
    ]
    store.add("text", [(i, problem(f"q{i}")) for i in range(4)], rows)
    return store


@pytest.mark.parametrize(("when", "asked", "correct"), [("wrong", 3, [1, 1, 0, 0]), ("all", 4, [0, 1, 0, 0])])
def test_the_judge_decides_where_it_is_asked(endpoint, store, tmp_path, when, asked, correct):
    quiet = Console(file=io.StringIO())
    score_run(tmp_path, store, {"text": TEXT}, quiet, judge(endpoint, tmp_path), when)
    scores = pd.read_parquet(tmp_path / "scores.parquet")
    assert len(endpoint.asked) == asked
    assert scores["correct"].tolist() == correct
    assert scores["rules"].tolist() == [1, 0, 0, 0]
    assert (scores["scorer"] == "judge grader-1").sum() == asked


def test_without_a_verdict_the_rules_decide(endpoint, store, tmp_path):
    endpoint.failures = ["?"] * 3
    console = Console(file=io.StringIO())
    half = replace(TEXT, score=lambda problem, text: Score(0.5, None))
    score_run(tmp_path, store, {"text": half}, console, judge(endpoint, tmp_path, judge_workers=1))
    scores = pd.read_parquet(tmp_path / "scores.parquet")
    assert scores["correct"].tolist() == [0.5, 0.5, 0.5, 0.0]
    assert scores["error"][0] == "judge grader-1 gave no verdict"


def test_the_table_names_both_scorers():
    entry = {
        "title": "Text",
        "headline": "accuracy",
        "scoring_note": "",
        "problems": 4,
        "belonging": 4,
        "n": 1,
        "metrics": {"accuracy": {"value": 0.5, "low": 0.1, "high": 0.9}},
        "scorers": {"judge grader-1": 3, "rules": 1},
        "errors": 0,
    }
    (table,) = make_tables([{"name": "m", "model": "m", "settings_line": "", "benchmarks": {"text": entry}}])
    assert table.rows[-1].scorer == "rules, then judge grader-1"
