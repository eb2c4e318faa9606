"""Pictures on the network, for data sets whose user has allowed it."""

import http.client
import urllib.error
import urllib.request

from .question import BadRow


TIMEOUT = 30.0
"""Seconds that a server may be silent."""


def fetch(address: str, max_bytes: int) -> bytes:
    """
    Download one file.

    Args:
        address (`str`): an `http:` or `https:` address. A redirection may lead only to another one.
        max_bytes (`int`): size at which the download ends.

    Returns:
        `bytes`: the file. Raises [`BadRow`] if the server does not send it, or it is larger.
    """
    try:
        with _opener().open(address, timeout=TIMEOUT) as response:
            data = response.read(max_bytes + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:  # the last for an address that is none
        reason = f"{type(error).__name__}: {error}"
        raise BadRow("missing image", f"{address[:200]!r} was not fetched ({reason})") from error
    if len(data) > max_bytes:
        raise BadRow("huge image", f"{address[:200]!r} has more than {max_bytes:,} bytes")
    return data


def _opener() -> urllib.request.OpenerDirector:
    """Of HTTP alone: `urlopen` would also follow a redirection to `ftp:`, and read `file:`."""
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
