"""
`sapo-trl view`: the recorded responses of one run or two as a page that needs nothing but a browser.

[`token_html`] shows a single response in a notebook.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from ..recordings.run import Recording, read_recording
    from .inline import token_html
    from .page import write_page


__all__ = ["Recording", "read_recording", "token_html", "write_page"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Recording": ".recordings.run",
        "read_recording": ".recordings.run",
        "token_html": "inline",
        "write_page": "page",
    },
)
