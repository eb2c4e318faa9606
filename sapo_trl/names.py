"""Names that users type."""

import difflib
from collections.abc import Iterable


def nearest_name(name: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` for a mistyped name, to append to an error; empty if no known name is similar."""
    similar = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean `{similar[0]}`?" if similar else ""
