"""HTTP, limited in time and size: JSON with one rule for repetitions, and single files."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urljoin

import requests
import urllib3
from requests.adapters import HTTPAdapter


logger = logging.getLogger(__name__)

MAX_DELAY = 30.0
"""Seconds between two attempts at most, also if the server asks for more."""
MAX_ANSWER_BYTES = 16 * 2**20
"""Of an answer, unless the caller expects more."""

_PIECE_BYTES = 2**16
_ERROR_BYTES = 2000
_PASSING = {408, 429}
"""Refusals that a later attempt may not meet."""
_NO_ENCODING = {"Accept-Encoding": "identity"}
"""For an answer that cannot grow when it is decoded."""
_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_REDIRECTS = 5
_SHOWN = 200
"""Characters of an address, which may hold a whole file, in an error."""


class RequestRefusedError(RuntimeError):
    """
    The server refused a request, or its answer cannot be read; asking again would change nothing.

    Args:
        message (`str`): the event.
        status (`int`, *optional*): of the answer; `None` for one that was accepted and cannot be read.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class AnswerTooLargeError(RequestRefusedError):
    """The answer has more bytes than the caller takes."""


class ServerLostError(RuntimeError):
    """The server did not answer, again and again."""


class HTTPClient:
    """
    Requests to one server, each repeated a bounded number of times.

    A request is repeated if it finds no server, if the connection breaks, if the whole answer is not there in time,
    and for the statuses 408, 429 and from 500 on: after the seconds that the answer's `Retry-After` names, else after
    1, 2, 4, … times `backoff` seconds, at most 30. Every failure is logged. Redirects are not followed: they would
    carry the request, and the key, to another host. Safe to use from several threads.

    Args:
        base_url (`str`): such as `"http://localhost:8000"`.
        timeout (`float`): seconds from the beginning of a request to the last byte of its answer.
        retries (`int`): how often a failed request is repeated; 0 for never.
        backoff (`float`): seconds before the first repetition.
        key (`str`, *optional*): sent as a bearer token.
        is_nearby (`bool`, *optional*, defaults to `False`):
            whether the server is on this machine or beside it. Proxies from the environment are for the outside world.
    """

    def __init__(
        self,
        base_url: str,
        timeout: float,
        retries: int,
        backoff: float,
        *,
        key: str | None = None,
        is_nearby: bool = False,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"`base_url` must start with http:// or https://, got {base_url!r}.")
        for name, value, least in (("timeout", timeout, 1e-9), ("retries", retries, 0), ("backoff", backoff, 0)):
            if value < least:
                raise ValueError(f"`{name}` must be {'positive' if least else 'at least 0'}, got {value!r}.")
        self.base_url = base_url.rstrip("/")
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self._headers = {"Content-Type": "application/json", **_NO_ENCODING}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._proxies = {"http": "", "https": ""} if is_nearby else {}

    def get(self, path: str, **kwargs: Any) -> Any:
        """`GET`; see [`HTTPClient.request`]."""
        return self.request("GET", path, None, **kwargs)

    def post(self, path: str, payload: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """`POST` of a JSON object; see [`HTTPClient.request`]."""
        return self.request("POST", path, payload, **kwargs)

    def request(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None,
        retries: int | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> Any:
        """
        Send a request until it is answered.

        Args:
            method (`str`): `"GET"` or `"POST"`.
            path (`str`): begins with a slash.
            payload (`dict`, *optional*): sent as JSON.
            retries (`int`, *optional*): instead of the client's.
            max_bytes (`int`, *optional*, defaults to 16 MiB): size of the answer at most.

        Returns:
            The decoded JSON, or `None` for an empty answer.

        Raises:
            [`ServerLostError`]: after the last repetition.
            [`RequestRefusedError`]: for any other status but success, an answer that is too large, and one that is no
                JSON.
        """
        asked = f"{method} {self.base_url}{path}"
        retries = self.retries if retries is None else retries
        for attempt in range(retries + 1):
            try:
                body = self._send(method, path, payload, max_bytes)
                break
            except _AttemptFailed as failure:
                if attempt == retries:
                    raise ServerLostError(
                        f"{asked} failed {retries + 1} time(s), at last with: {failure}"
                    ) from failure
                delay = self.backoff * 2**attempt if failure.retry_after is None else failure.retry_after
                delay = min(delay, MAX_DELAY)
                logger.warning(
                    "%s failed (%s); attempt %d of %d follows in %.1f s.",
                    asked,
                    failure,
                    attempt + 2,
                    retries + 1,
                    delay,
                )
                time.sleep(delay)
        try:
            return json.loads(body) if body else None
        except (ValueError, RecursionError) as error:
            raise RequestRefusedError(
                f"{asked} was answered with something else than JSON: {body[:200]!r}."
            ) from error

    def _send(self, method: str, path: str, payload: dict[str, Any] | None, max_bytes: int) -> bytes:
        """The body of the answer to one attempt."""
        asked = f"{method} {self.base_url}{path}"
        status, headers, body = _exchange(
            method,
            self.base_url + path,
            self.timeout,
            max_bytes,
            data=None if payload is None else json.dumps(payload).encode(),
            headers=self._headers,
            proxies=self._proxies,
        )
        if status < 300:
            if len(body) > max_bytes:
                raise AnswerTooLargeError(f"{asked} was answered with more than {max_bytes:,} bytes.")
            return body
        answer = f"{status} {body[:_ERROR_BYTES].decode(errors='replace')}".rstrip()
        if status in _PASSING or status >= 500:
            raise _AttemptFailed(answer, _seconds(headers.get("Retry-After")))
        if status < 400:
            answer += f" It points to {headers.get('Location')!r}, and redirects are not followed."
        raise RequestRefusedError(f"{asked} was refused: {answer}", status)


def download(address: str, timeout: float, max_bytes: int) -> bytes:
    """
    Download one file, in one attempt.

    Args:
        address (`str`): an `http:` or `https:` address. A redirect may lead only to another one.
        timeout (`float`): seconds until the last byte is there, redirects included.
        max_bytes (`int`): size of the file at most.

    Returns:
        `bytes`: the file.

    Raises:
        [`ServerLostError`]: if it is not there in time, or the connection breaks.
        [`RequestRefusedError`]: for an address of another kind, and a refusal.
        [`AnswerTooLargeError`]: for a larger file.
    """
    deadline = time.monotonic() + timeout
    asked = f"GET {address[:_SHOWN]}"
    for _ in range(_MAX_REDIRECTS + 1):
        if not address.lower().startswith(("http://", "https://")):
            raise RequestRefusedError(f"{asked} leads to {address[:_SHOWN]!r}, which is no HTTP address.")
        try:
            remaining = max(deadline - time.monotonic(), 1e-3)
            status, headers, body = _exchange("GET", address, remaining, max_bytes, headers=_NO_ENCODING)
        except _AttemptFailed as failure:
            raise ServerLostError(f"{asked} failed: {failure}") from failure
        if status < 300:
            if len(body) > max_bytes:
                raise AnswerTooLargeError(f"{asked} was answered with more than {max_bytes:,} bytes.")
            return body
        if status not in _REDIRECTS or "Location" not in headers:
            raise RequestRefusedError(f"{asked} was refused with status {status}.", status)
        try:
            address = urljoin(address, headers["Location"])
        except ValueError as error:
            raise RequestRefusedError(f"{asked} leads to no address: {error}.", status) from error
    raise RequestRefusedError(f"{asked} was redirected more than {_MAX_REDIRECTS} times.")


def _exchange(
    method: str, address: str, timeout: float, max_bytes: int, **settings: Any
) -> tuple[int, Mapping[str, str], bytes]:
    """
    One request: the answer's status, its headers, and its body or a little more than its first `max_bytes`.

    Args:
        method (`str`): of the request.
        address (`str`): of the request.
        timeout (`float`): seconds from the beginning of the request to the last byte of its answer.
        max_bytes (`int`): size at which the body of an accepted request is no longer read.
        settings: of [`requests.Session.request`].
    """
    deadline = time.monotonic() + timeout
    try:
        with _ended_at(deadline) as adapter, _Session() as session:
            session.mount("http://", adapter)
            session.mount("https://", adapter)
            with session.request(
                method,
                address,
                auth=lambda request: request,  # or a key of a .netrc would be sent
                timeout=timeout,
                stream=True,
                **settings,
            ) as response:
                status, headers = response.status_code, response.headers
                body = _read(response.raw, max_bytes if status < 300 else _ERROR_BYTES)
    except (OSError, urllib3.exceptions.HTTPError) as error:  # all of `requests`' are OSErrors
        if time.monotonic() >= deadline:
            raise _AttemptFailed(f"no whole answer within {timeout:g} s") from error
        raise _AttemptFailed(f"{type(error).__name__}: {error}") from error
    if time.monotonic() >= deadline:  # an answer that was cut may look whole
        raise _AttemptFailed(f"no whole answer within {timeout:g} s")
    return status, headers, body


class _AttemptFailed(Exception):
    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class _Session(requests.Session):
    """
    Knows no redirects. With `allow_redirects=False`, `requests` would still read the whole body of one, without a
    limit, and raise the errors of a broken address.
    """

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


class _EndableAdapter(HTTPAdapter):
    """Remembers its sockets, which `requests` and urllib3 keep to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self._sockets: list[socket.socket] = []

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        make = pool.ConnectionCls

        def remembering(**settings: Any) -> Any:
            connection = make(**settings)
            connect = connection.connect

            def connect_and_remember() -> None:
                connect()
                self._sockets.append(connection.sock)

            connection.connect = connect_and_remember
            return connection

        pool.ConnectionCls = remembering
        return pool

    def end(self) -> None:
        """End all reading and writing, from any thread."""
        for open_socket in list(self._sockets):
            # A second handle, because a TLS socket is not to be shut down by a thread that does not read it.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(open_socket.fileno())) as handle:
                handle.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _ended_at(deadline: float) -> Iterator[_EndableAdapter]:
    """
    An adapter whose connections end at a time. The timeouts of `requests` are limits between two bytes: a server that
    sends one now and then would be listened to for ever.
    """
    adapter, is_done = _EndableAdapter(), threading.Event()

    def watch() -> None:
        is_done.wait(deadline - time.monotonic())
        while not is_done.wait(0.05):  # again, for a connection that is made too late
            adapter.end()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield adapter
    finally:
        is_done.set()


def _read(raw: urllib3.HTTPResponse, max_bytes: int) -> bytes:
    """A body, or a little more than its first `max_bytes`."""
    pieces, size = [], 0
    # Not `stream`, which reads the sizes of chunks without a limit.
    while size <= max_bytes and (piece := raw.read(_PIECE_BYTES, decode_content=False)):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _seconds(retry_after: str | None) -> float | None:
    """Of a `Retry-After` header, which is a number or a date; `None` for neither."""
    try:
        return None if retry_after is None else urllib3.Retry().parse_retry_after(retry_after)
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return None
