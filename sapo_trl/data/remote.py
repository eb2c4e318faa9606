"""Fetches pictures from the network, if the user allows it."""

from ..http_client import AnswerTooLargeError, RequestRefusedError, ServerLostError, download
from .question import BadRow


TIMEOUT = 60.0
"""Seconds until the whole file is there."""


def fetch(address: str, max_bytes: int) -> bytes:
    """
    Download one file.

    Args:
        address (`str`): an `http:` or `https:` address. A redirect may lead only to another one.
        max_bytes (`int`): size of the file at most.

    Returns:
        `bytes`: the file. Raises [`BadRow`] if the server does not send it in time, or it is larger.
    """
    try:
        return download(address, TIMEOUT, max_bytes)
    except AnswerTooLargeError as error:
        raise BadRow("huge image", str(error)) from error
    except (RequestRefusedError, ServerLostError) as error:
        raise BadRow("missing image", str(error)) from error
