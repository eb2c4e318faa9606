"""Fetches pictures from the network, if the user allows it."""

import http.client
import urllib.error
import urllib.request

from .question import BadRow


TIMEOUT = 30.0
"""Timeout in seconds: longest wait for the server's next bytes."""


def fetch(address: str, max_bytes: int) -> bytes:
    """
    Download one file.

    Args:
        address (`str`): an `http:` or `https:` address. A redirection may lead only to such an address.
        max_bytes (`int`): the largest size of the file. The download stops there.

    Returns:
        `bytes`: the file. Raises [`BadRow`] if the server does not send the file, or if the file is larger.
    """
    try:
        with _opener().open(address, timeout=TIMEOUT) as response:
            data = response.read(max_bytes + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:  # `ValueError` for an invalid address
        reason = f"{type(error).__name__}: {error}"
        raise BadRow("missing image", f"{address[:200]!r} was not fetched ({reason})") from error
    if len(data) > max_bytes:
        raise BadRow("huge image", f"{address[:200]!r} has more than {max_bytes:,} bytes")
    return data


def _opener() -> urllib.request.OpenerDirector:
    """An opener for HTTP only. `urlopen` would also follow a redirection to `ftp:`, and read `file:`."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
