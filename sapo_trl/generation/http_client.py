"""JSON over HTTP with bounded retries, from the standard library."""

from __future__ import annotations

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from typing import Any


logger = logging.getLogger(__name__)

MAX_BACKOFF = 30.0
"""Seconds between two attempts at most."""


class SamplerError(RuntimeError):
    """The sampler answered, and refused or contradicted what it was asked."""


class SamplerLostError(SamplerError):
    """The sampler did not answer, again and again."""


class HTTPClient:
    """
    Requests to one server, each repeated a bounded number of times.

    A request that finds no server, a broken connection, no answer in time or an answer of 500 and above is repeated
    after 1, 2, 4, … times `backoff` seconds; every failure is logged. Safe to use from several threads.

    Args:
        base_url (`str`): such as `"http://localhost:8000"`.
        timeout (`float`): seconds an answer may take.
        retries (`int`): how often a failed request is repeated; 0 for never.
        backoff (`float`): seconds before the first repetition.
    """

    def __init__(self, base_url: str, timeout: float, retries: int, backoff: float):
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"`base_url` must start with http:// or https://, got {base_url!r}.")
        for name, value, least in (("timeout", timeout, 1e-9), ("retries", retries, 0), ("backoff", backoff, 0)):
            if value < least:
                raise ValueError(f"`{name}` must be {'positive' if least else 'at least 0'}, got {value!r}.")
        self.base_url = base_url.rstrip("/")
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        # A proxy from the environment is for the outside world; a sampler is on this machine or beside it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str, **kwargs: Any) -> Any:
        """`GET`; see [`HTTPClient.request`]."""
        return self.request("GET", path, None, **kwargs)

    def post(self, path: str, payload: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """`POST` of a JSON object; see [`HTTPClient.request`]."""
        return self.request("POST", path, payload, **kwargs)

    def request(self, method: str, path: str, payload: dict[str, Any] | None, retries: int | None = None) -> Any:
        """
        Send a request until it is answered.

        Args:
            method (`str`): `"GET"` or `"POST"`.
            path (`str`): begins with a slash.
            payload (`dict`, *optional*): sent as JSON.
            retries (`int`, *optional*): in the place of the client's.

        Returns:
            The decoded JSON, or `None` for an empty answer.

        Raises:
            [`SamplerLostError`]: after the last repetition.
            [`SamplerError`]: for an answer of 400 to 499, which repeating would not change.
        """
        retries = self.retries if retries is None else retries
        for attempt in range(retries + 1):
            try:
                return self._send(method, path, payload)
            except SamplerLostError as error:
                if attempt == retries:
                    raise SamplerLostError(
                        f"{method} {self.base_url}{path} failed {retries + 1} time(s), at last with: {error}"
                    ) from error
                delay = min(self.backoff * 2**attempt, MAX_BACKOFF)
                logger.warning(
                    "%s %s%s failed (%s); attempt %d of %d follows in %.1f s.",
                    method,
                    self.base_url,
                    path,
                    error,
                    attempt + 2,
                    retries + 1,
                    delay,
                )
                time.sleep(delay)

    def _send(self, method: str, path: str, payload: dict[str, Any] | None) -> Any:
        data = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(
            self.base_url + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            with error:
                answer = f"{error.code} {_excerpt(error)}"
            if error.code >= 500:
                raise SamplerLostError(answer) from error
            raise SamplerError(f"{method} {self.base_url}{path} was refused: {answer}") from error
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise SamplerLostError(f"{type(error).__name__}: {error}") from error
        try:
            return json.loads(body) if body else None
        except ValueError as error:
            raise SamplerError(
                f"{method} {self.base_url}{path} was answered with something else than JSON: {body[:200]!r}. Is this "
                "a vLLM server?"
            ) from error


def _excerpt(response: Any) -> str:
    """The beginning of an error's body; a server that dies may break off in the middle of it."""
    try:
        return response.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return "(without an explanation)"
