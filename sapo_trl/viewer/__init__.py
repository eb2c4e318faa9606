"""`sapo-trl view`: the recorded responses of one run or two as a page that needs nothing but a browser."""

from .page import write_page
from .recordings import Recording, read_recording


__all__ = ["Recording", "read_recording", "write_page"]
