"""
`sapo-trl view`: the recorded responses of one run or two as a page that needs nothing but a browser.

[`token_html`] shows a single response in a notebook.
"""

from .inline import token_html
from .page import write_page
from .recordings import Recording, read_recording


__all__ = ["Recording", "read_recording", "token_html", "write_page"]
