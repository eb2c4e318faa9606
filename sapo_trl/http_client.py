"""HTTP with limits of time and size: JSON, with one rule for retries, and single files."""

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
"""Longest time between two attempts in seconds, even if the server asks for more."""
MAX_ANSWER_BYTES = 16 * 2**20
"""Largest size of an answer, unless the caller expects more."""

_PIECE_BYTES = 2**16
_ERROR_BYTES = 2000
_PASSING = {408, 429}
"""Refusals that may not occur again in a later attempt."""
_NO_ENCODING = {"Accept-Encoding": "identity"}
"""For an answer that cannot grow when it is decoded."""
_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_REDIRECTS = 5
_STOP_SECONDS = 0.1
"""Seconds after which a request notices that it is to stop."""
_SHOWN = 200
"""Characters of an address, which may hold a whole file, in an error."""


class RequestRefusedError(RuntimeError):
    """
    The server refused a request, or its answer is unreadable. A repetition would change nothing.

    Args:
        message (`str`): description of the error.
        status (`int`, *optional*): status of the answer; `None` if the request was accepted, but the answer is
            unreadable.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class AnswerTooLargeError(RequestRefusedError):
    """The answer has more bytes than the caller takes."""


class ServerLostError(RuntimeError):
    """The server did not answer, even after retries."""


class RequestStoppedError(RuntimeError):
    """The caller has no more use for the answer."""


class HTTPClient:
    """
    Sends requests to one server, and repeats failed requests a limited number of times.

    A request has failed if there is no server, if the connection breaks, if the answer is not complete in time, or if
    its status is 408, 429 or at least 500. It is repeated after the seconds in the answer's `Retry-After`, or
    otherwise after 1, 2, 4, … times `backoff` seconds. Both are limited to 30 seconds. Every failure is logged.
    Redirects are not followed: they would carry the request, and the key, to another host. Several threads may use one
    client.

    Args:
        base_url (`str`): address of the server, such as `"http://localhost:8000"`.
        timeout (`float`): seconds from the beginning of a request to the last byte of its answer.
        retries (`int`): largest number of repetitions of a failed request; 0 for none.
        backoff (`float`): seconds before the first repetition.
        key (`str`, *optional*): key to send as a bearer token.
        is_nearby (`bool`, *optional*, defaults to `False`):
            whether the server is in the local network. Then proxies from the environment are ignored.
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
        """Send a `GET` request; see [`HTTPClient.request`]."""
        return self.request("GET", path, None, **kwargs)

    def post(self, path: str, payload: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Send a `POST` request with a JSON object; see [`HTTPClient.request`]."""
        return self.request("POST", path, payload, **kwargs)

    def request(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None,
        retries: int | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
        stop: threading.Event | None = None,
    ) -> Any:
        """
        Send a request until it is answered.

        Args:
            method (`str`): `"GET"` or `"POST"`.
            path (`str`): path of the address, with a slash in front.
            payload (`dict`, *optional*): JSON object to send.
            retries (`int`, *optional*): replaces the client's `retries`.
            max_bytes (`int`, *optional*, defaults to 16 MiB): largest size of the answer.
            stop (`threading.Event`, *optional*): ends the request and its repetitions as soon as it is set.

        Returns:
            The decoded JSON, or `None` for an empty answer.

        Raises:
            [`ServerLostError`]: if the last repetition fails, too.
            [`RequestRefusedError`]: for any other status except success, and for an answer that is too large or not
                JSON.
            [`RequestStoppedError`]: if `stop` was set.
        """
        asked = f"{method} {self.base_url}{path}"
        retries = self.retries if retries is None else retries
        for attempt in range(retries + 1):
            try:
                body = self._send(method, path, payload, max_bytes, stop)
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
                if stop is None:
                    time.sleep(delay)
                elif stop.wait(delay):
                    raise RequestStoppedError(f"{asked} was given up.") from failure
        try:
            return json.loads(body) if body else None
        except (ValueError, RecursionError) as error:
            raise RequestRefusedError(
                f"{asked} was answered with something else than JSON: {body[:200]!r}."
            ) from error

    def _send(
        self, method: str, path: str, payload: dict[str, Any] | None, max_bytes: int, stop: threading.Event | None
    ) -> bytes:
        """The body of the answer to one attempt."""
        asked = f"{method} {self.base_url}{path}"
        status, headers, body = _exchange(
            method,
            self.base_url + path,
            self.timeout,
            max_bytes,
            stop,
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
            answer += f" It redirects to {headers.get('Location')!r}, but redirects are not followed."
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
    method: str, address: str, timeout: float, max_bytes: int, stop: threading.Event | None = None, **settings: Any
) -> tuple[int, Mapping[str, str], bytes]:
    """
    One request: the answer's status, its headers, and its body or a little more than its first `max_bytes`.

    Args:
        method (`str`): of the request.
        address (`str`): of the request.
        timeout (`float`): seconds from the beginning of the request to the last byte of its answer.
        max_bytes (`int`): size at which the body of an accepted request is no longer read.
        stop (`threading.Event`, *optional*): ends the request as soon as it is set.
        settings: of [`requests.Session.request`].
    """
    deadline = time.monotonic() + timeout
    try:
        with _ended_at(deadline, stop) as adapter, _Session() as session:
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
        if stop is not None and stop.is_set():
            raise RequestStoppedError(f"{method} {address[:_SHOWN]} was given up.") from error
        if time.monotonic() >= deadline:
            raise _AttemptFailed(f"no whole answer within {timeout:g} s") from error
        raise _AttemptFailed(f"{type(error).__name__}: {error}") from error
    if stop is not None and stop.is_set():
        raise RequestStoppedError(f"{method} {address[:_SHOWN]} was given up.")
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
    """An adapter that remembers its sockets. `requests` and urllib3 do not give access to them."""

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
            # Use a second handle: a TLS socket must not be shut down by another thread than its reader.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(open_socket.fileno())) as handle:
                handle.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _ended_at(deadline: float, stop: threading.Event | None = None) -> Iterator[_EndableAdapter]:
    """
    An adapter that ends its connections at a given time, or when `stop` is set. The timeouts of `requests` only limit
    the time between two bytes. A server that sends a byte now and then would never time out.
    """
    adapter, is_done = _EndableAdapter(), threading.Event()

    def watch() -> None:
        while (left := deadline - time.monotonic()) > 0 and not (stop is not None and stop.is_set()):
            if is_done.wait(left if stop is None else min(left, _STOP_SECONDS)):
                return
        while not is_done.wait(0.05):  # again and again, because a connection may be made too late
            adapter.end()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield adapter
    finally:
        is_done.set()


def _read(raw: urllib3.HTTPResponse, max_bytes: int) -> bytes:
    """A response's body. A body over `max_bytes` is read a little beyond this limit."""
    pieces, size = [], 0
    # Do not use `stream`, because it reads the sizes of chunks without a limit.
    while size <= max_bytes and (piece := raw.read(_PIECE_BYTES, decode_content=False)):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of a `Retry-After` header, which is a number or a date; `None` for anything else."""
    try:
        return None if retry_after is None else urllib3.Retry().parse_retry_after(retry_after)
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return None
