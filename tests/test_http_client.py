"""The HTTP client, against servers on this machine that are slow, endless, wrong or hostile."""

import contextlib
import gzip
import json
import logging
import re
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from sapo_trl import http_client
from sapo_trl.http_client import AnswerTooLargeError, HTTPClient, RequestRefusedError, ServerLostError, download
from tests.vllm.servers import free_port


HEAD = b"HTTP/1.1 200 OK\r\n"
DROP = 0.05


def answer(body=b'{"is": "well"}', status="200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class ScriptedServer:
    """Answers each connection with the next of some scripts: bytes, or an iterator of bytes."""

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.requests: list[bytes] = []
        self.sent = 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.threads = [threading.Thread(target=self._serve, daemon=True)]
        self.threads[0].start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
                thread = threading.Thread(target=self._answer, args=(connection, script), daemon=True)
                self.threads.append(thread)
                thread.start()

    def _answer(self, connection, script):
        with contextlib.suppress(OSError), connection:
            request = b""
            while not (end := request.find(b"\r\n\r\n") + 4) > 3:
                request += connection.recv(65536)
            length = re.search(rb"Content-Length: (\d+)", request)
            while length and len(request) < end + int(length[1]):
                request += connection.recv(65536)
            self.requests.append(request)
            for piece in [script] if isinstance(script, bytes) else script():
                connection.sendall(piece)
                self.sent += len(piece)

    def close(self):
        # Wakes `accept`, which closing alone does not.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


@pytest.fixture
def serve():
    servers = []

    def start(*scripts):
        servers.append(ScriptedServer(*scripts))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def client(server, **settings):
    url = server if isinstance(server, str) else server.url
    return HTTPClient(url, **{"timeout": 5.0, "retries": 0, "backoff": 0.01, **settings})


def slowly(beginning: bytes, drop: bytes):
    """A beginning, and then a little now and then, always before a limit between two bytes would be reached."""

    def script():
        yield beginning
        while True:
            time.sleep(DROP)
            yield drop

    return script


def silence():
    time.sleep(1)
    yield b""


SLOW = {
    "body": slowly(HEAD + b"Content-Length: 1000000\r\n\r\n", b" "),
    "body without a length": slowly(HEAD + b"\r\n", b" "),
    "chunks": slowly(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "size of a chunk": slowly(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "headers": slowly(HEAD, b"X-More: yes\r\n"),
    "one header": slowly(HEAD + b"X-More: ", b"y"),
    "status": slowly(b"HTTP/1.1 200 ", b"O"),
    "refusal": slowly(b"HTTP/1.1 400 No\r\nContent-Length: 1000000\r\n\r\n", b" "),
    "nothing": silence,
}


class TestTime:
    @pytest.mark.parametrize("kind", SLOW)
    def test_a_whole_answer_has_a_limit(self, serve, kind):
        server = serve(SLOW[kind])
        started = time.monotonic()
        with pytest.raises(ServerLostError, match=r"failed 1 time\(s\), at last with: no whole answer within 0.4 s"):
            client(server, timeout=0.4).get("/")
        assert 0.35 < time.monotonic() - started < 5
        # Nothing goes on listening.
        for thread in server.threads[1:]:
            thread.join(2)
            assert not thread.is_alive()

    def test_what_was_cut_is_not_taken_for_whole(self, serve):
        """A body without a length ends with the connection, whoever ends it."""
        server = serve(slowly(HEAD + b"\r\n[1]", b" "))
        with pytest.raises(ServerLostError, match="no whole answer within 0.3 s"):
            client(server, timeout=0.3).get("/")

    def test_waits_twice_as_long_each_time(self, caplog):
        nobody = client(f"http://127.0.0.1:{free_port()}", retries=3, backoff=0.1)
        started = time.monotonic()
        with caplog.at_level(logging.WARNING), pytest.raises(ServerLostError, match="failed 4 time"):
            nobody.get("/health")
        assert 0.7 <= time.monotonic() - started < 5
        assert [record.args[-1] for record in caplog.records] == [0.1, 0.2, 0.4]


class TestSize:
    @pytest.mark.parametrize(
        "beginning", [HEAD + b"Content-Length: 99999999999\r\n\r\n", HEAD + b"\r\n"], ids=["a length", "none"]
    )
    def test_an_endless_body_is_read_to_the_limit(self, serve, beginning):
        def script():
            yield beginning
            while True:
                yield b" " * 2**20

        server = serve(script)
        with pytest.raises(RequestRefusedError, match="answered with more than 1,000,000 bytes") as caught:
            client(server, retries=3).get("/", max_bytes=1_000_000)
        assert caught.value.status is None and len(server.requests) == 1
        server.threads[1].join(2)
        assert server.sent < 20 * 2**20  # what fits into buffers on the way

    def test_an_endless_size_of_a_chunk(self, serve):
        def script():
            yield HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
            while True:
                yield b"0" * 2**20

        server = serve(script)
        with pytest.raises(ServerLostError, match="failed 1 time"):
            client(server).get("/")
        server.threads[1].join(2)
        assert server.sent < 20 * 2**20

    def test_the_body_of_a_redirect_is_not_read(self, serve):
        """`requests` would read it whole, to have the connection free for the next request."""

        def script():
            yield b"HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n"
            while True:
                yield b" " * 2**20

        server = serve(script)
        with pytest.raises(RequestRefusedError, match="redirects are not followed"):
            client(server).get("/")
        server.threads[1].join(2)
        assert server.sent < 20 * 2**20

    def test_the_limit_itself_is_allowed(self, serve):
        server = serve(answer(b" " * 998 + b"17"))
        assert client(server).get("/", max_bytes=1000) == 17
        with pytest.raises(RequestRefusedError):
            client(server).get("/", max_bytes=999)

    def test_nothing_is_unpacked(self, serve):
        """A megabyte that becomes a gigabyte is a way around a limit."""
        server = serve(answer(gzip.compress(b"[1]"), "200 OK", "Content-Encoding: gzip"))
        with pytest.raises(RequestRefusedError, match="something else than JSON"):
            client(server).get("/")
        assert b"Accept-Encoding: identity" in server.requests[0]

    @pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"<html>", b"\xff\xfe", b"1" * 5000])
    def test_what_is_no_json_or_too_deep(self, serve, body):
        with pytest.raises(RequestRefusedError, match="something else than JSON"):
            client(serve(answer(body))).get("/")

    def test_an_empty_answer(self, serve):
        assert client(serve(answer(b""))).get("/") is None


class TestRepetitions:
    @pytest.mark.parametrize(
        "failure",
        [
            *(answer(b"", status) for status in ("408 Slow", "429 Busy", "500 Broken", "503 Away")),
            b"",
            HEAD + b"Content-Length: 50\r\n\r\n[1",
            b"no HTTP at all\r\n\r\n",
        ],
        ids=["408", "429", "500", "503", "hangs up", "cut body", "no HTTP"],
    )
    def test_what_passes_is_tried_again(self, serve, failure):
        server = serve(failure, failure, answer())
        assert client(server, retries=2).post("/x", {"a": 1}) == {"is": "well"}
        assert len(server.requests) == 3
        assert all(b'{"a": 1}' in request for request in server.requests)
        server = serve(failure)
        with pytest.raises(ServerLostError, match=r"POST .*/x failed 2 time\(s\)"):
            client(server, retries=1).post("/x", {"a": 1})

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
    def test_a_refusal_is_not_repeated(self, serve, status):
        server = serve(answer(b"because", f"{status} No"))
        with pytest.raises(RequestRefusedError, match=f"GET {server.url}/x was refused: {status} because") as caught:
            client(server, retries=3).get("/x")
        assert caught.value.status == status and len(server.requests) == 1

    def test_a_server_says_how_long_to_wait(self, serve, monkeypatch):
        waited = []
        monkeypatch.setattr(http_client, "time", SimpleNamespace(sleep=waited.append, monotonic=time.monotonic))
        later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3600))
        asked = ["0", "7", "86400", later, "soon", "-3"]
        failures = [answer(b"", "429 Busy", f"Retry-After: {value}") for value in asked]
        server = serve(*failures, answer(b"", "503 Away"), answer())
        assert client(server, retries=7, backoff=1.0).get("/") == {"is": "well"}
        # A day and an hour are cut; what is no number of seconds leaves it to the client.
        assert waited == [0, 7, 30, 30, 16, 30, 30]

    def test_headers_of_a_refusal_are_bounded(self, serve):
        server = serve(answer(b"y" * 100_000, "400 No"))
        with pytest.raises(RequestRefusedError) as caught:
            client(server).get("/")
        assert len(str(caught.value)) < 2200


class TestWhereItGoes:
    @pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"])
    def test_no_redirect_is_followed(self, serve, status):
        other = serve(answer())
        server = serve(answer(b"", status, f"Location: {other.url}/x"))
        with pytest.raises(RequestRefusedError, match=f"{status[:3]}.* It redirects to '{other.url}/x'") as caught:
            client(server, key="secret").post("/x", {})
        assert caught.value.status == int(status[:3])
        assert other.requests == []

    @pytest.mark.parametrize("target", ["http://[", "//[", "http://a b:c/"])
    def test_a_redirect_to_no_address_is_a_refusal(self, serve, target):
        with pytest.raises(RequestRefusedError, match="was refused: 302"):
            client(serve(answer(b"", "302 Found", f"Location: {target}"))).get("/")

    def test_the_key_goes_along_whatever_a_netrc_says(self, serve, monkeypatch, tmp_path):
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password of-another\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        server = serve(answer())
        client(server, key="secret-7").get("/x")
        client(server).get("/x")
        assert b"Authorization: Bearer secret-7\r\n" in server.requests[0]
        assert b"Authorization" not in server.requests[1]

    @pytest.mark.parametrize("name", ["http_proxy", "all_proxy"])
    def test_proxies_are_for_servers_that_are_not_nearby(self, serve, monkeypatch, name):
        proxy, server = serve(answer(b'"proxy"')), serve(answer(b'"server"'))
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv(name, proxy.url)
        assert client(server).get("/") == "proxy"
        assert client(server, is_nearby=True).get("/") == "server"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"timeout": 0}, "`timeout` must be positive, got 0"),
            ({"retries": -1}, "`retries` must be at least 0, got -1"),
            ({"backoff": -1}, "`backoff` must be at least 0, got -1"),
        ],
    )
    def test_settings_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            client("http://localhost:1", **settings)
        with pytest.raises(
            ValueError, match="`base_url` must start with http:// or https://, got 'file:///etc/passwd'"
        ):
            client("file:///etc/passwd")


def test_many_at_a_time(serve):
    server = serve(answer(json.dumps(list(range(1000))).encode()))
    one, results = client(server), []
    threads = [threading.Thread(target=lambda: results.append(one.get("/"))) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [list(range(1000))] * 32


class TestDownload:
    @pytest.mark.parametrize("kind", SLOW)
    def test_a_slow_server_ends_at_the_limit(self, serve, kind):
        started = time.monotonic()
        with pytest.raises((ServerLostError, RequestRefusedError)):
            download(f"{serve(SLOW[kind]).url}/a.png", 0.3, 1000)
        assert time.monotonic() - started < 3

    def test_all_redirects_share_the_limit(self, serve):
        def later():
            time.sleep(0.2)
            yield answer(b"", "302 Found", "Location: /again")

        started = time.monotonic()
        with pytest.raises(ServerLostError, match="no whole answer within"):
            download(serve(later).url, 0.5, 1000)
        assert 0.4 < time.monotonic() - started < 3

    def test_an_endless_redirect_ends(self, serve):
        server = serve(answer(b"", "302 Found", "Location: /again"))
        with pytest.raises(RequestRefusedError, match="redirected more than 5 times"):
            download(server.url, 5, 1000)
        assert len(server.requests) == 6

    @pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/a", "data:text/plain,a", "http://["])
    def test_a_redirect_leads_to_http_alone(self, serve, target):
        server = serve(answer(b"", "302 Found", f"Location: {target}"))
        with pytest.raises((RequestRefusedError, ServerLostError)):
            download(server.url, 5, 1000)
        assert len(server.requests) == 1

    def test_a_redirect_is_followed(self, serve):
        target = serve(answer(b"picture"))
        assert download(serve(answer(b"", "301 Moved", f"Location: {target.url}/b")).url, 5, 7) == b"picture"
        with pytest.raises(AnswerTooLargeError, match="more than 6 bytes"):
            download(target.url, 5, 6)

    @pytest.mark.parametrize(
        "address",
        ["http://", "http:///a", "http://[", "http://a b/", "http://" + "a" * 300, "http://x:99999/", "http://\n"],
    )
    def test_an_address_of_nothing_is_an_error_of_its_own(self, address):
        with pytest.raises((RequestRefusedError, ServerLostError)):
            download(address, 1, 1000)
