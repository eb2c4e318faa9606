"""The page: template, style sheet, script and data in one file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex
from plotly.offline import get_plotlyjs

from ..files import write_text
from ..recordings.run import Recording
from .payload import build_payload


_FOLDER = Path(__file__).parent
_COLOURS = 64


def colour_scales() -> dict[str, dict[str, list[str]]]:
    """
    Colours by theme and kind, low to high. Low, or zero of signed numbers, is close to the page's background, so that
    large values stand out. Lightness is monotone towards the ends, and blue and orange differ for every kind
    of colour blindness.
    """
    diverging = {
        "light": LinearSegmentedColormap.from_list("", ["#b34700", "#f2a25c", "#f4f4f2", "#7db4e6", "#0b559f"]),
        "dark": LinearSegmentedColormap.from_list("", ["#ff9d42", "#8f4d12", "#22262d", "#1f5a94", "#69b7ff"]),
    }
    sequential = {"light": matplotlib.colormaps["YlGnBu"], "dark": matplotlib.colormaps["viridis"]}
    return {
        theme: {"sequential": _colours(sequential[theme]), "diverging": _colours(diverging[theme])}
        for theme in ("light", "dark")
    }


def write_page(recordings: Sequence[Recording], path: str | Path, max_tokens: int = 1_200_000) -> dict[str, Any]:
    """
    Write the page of one run or two.

    Args:
        recordings (`Sequence[Recording]`): the runs.
        path (`str` or `Path`): HTML file to write.
        max_tokens (`int`, *optional*, defaults to `1_200_000`):
            about how many tokens the page holds at most; a million take about 20 MB.

    Returns:
        `dict`: `responses` (their number on the page), `bytes` of the file and `notes`.
    """
    if max_tokens < 1:
        raise ValueError(f"`max_tokens` must be at least 1, got {max_tokens}.")
    payload = build_payload(recordings, max_tokens)
    page = _render({**payload.meta, "scales": colour_scales()}, payload.tokens)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not through a link: the folder may be someone else's, and lead to any file of this machine.
    write_text(path, page)
    return {
        "responses": len(payload.meta["responses"]["run"]),
        "bytes": path.stat().st_size,
        "notes": payload.meta["notes"],
    }


def _render(meta: dict[str, Any], tokens: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    scripts = {"plotly": get_plotlyjs(), "script": (_FOLDER / "page.js").read_text(encoding="utf-8")}
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    # Nothing but these very texts runs, and nothing is fetched: recorded text that got past the script's care for it
    # would still be dead.
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(map(_source, scripts.values()))}",
            "style-src 'unsafe-inline'",  # plotly brings styles of its own; they can neither run nor load anything
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return environment.get_template("page.html.jinja").render(
        meta=meta, tokens=tokens, policy=policy, style=Markup(style), **{k: Markup(v) for k, v in scripts.items()}
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _colours(colormap: Colormap) -> list[str]:
    return [to_hex(colormap(index / (_COLOURS - 1))) for index in range(_COLOURS)]
