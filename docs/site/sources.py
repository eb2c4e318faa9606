"""
A hook of mkdocs. It turns a link out of `docs/` into a link to a page with the file, and copies linked pictures.

The pages are also read in the repository, where `../sapo_trl/losses.py` is right. On the site, each such file, or each
file of such a folder, gets its own page with the text. A link to a missing file ends a strict build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


log = logging.getLogger("mkdocs.hooks.sources")

LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)(#[^)\s]*)?(?=\))")
PICTURES = (".png", ".svg")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".md": "markdown", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every text outside of `docs/` that a page links to, and every picture that it shows."""
    root = Path(config.docs_dir).parent
    for file in list(files.documentation_pages()):
        for match in LINK.finditer(file.content_string):
            target = _target(match[1], file.src_uri)
            if target is None or files.get_file_from_path(_page(target)) is not None:
                continue
            if not (root / target).exists():
                log.warning(f"{file.src_uri}: the link '{match[1]}' leads to nothing")
                continue
            if target.endswith(PICTURES):
                files.append(File.generated(config, _page(target), abs_src_path=str(root / target)))
            else:
                files.append(File.generated(config, _page(target), content=_text(root, target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links to those pages."""

    def replaced(match: re.Match[str]) -> str:
        target = _target(match[1], page.file.src_uri)
        if target is None or files.get_file_from_path(_page(target)) is None:
            return match[0]
        return posixpath.relpath(_page(target), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(replaced, markdown)


def _target(link: str, src_uri: str) -> str | None:
    """Path of a link from the repository's root; `None` if it stays within `docs/`."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(src_uri), link))
    return None if path.startswith("docs/") else path


def _page(target: str) -> str:
    if target.startswith("notebooks/"):  # made by notebooks.py
        return target.replace("README.md", "index.md").replace(".ipynb", ".md")
    return f"source/{target}" if target.endswith(PICTURES) else f"source/{target}.md"


def _text(root: Path, target: str) -> str:
    path = root / target
    parts = ["---", "search: {exclude: true}", "---", f"# `{target}`", ""]
    for file in [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file()):
        if file != path:
            parts += [f"## `{file.name}`", ""]
        # Longer than any fence inside.
        parts += [f"``````{LANGUAGES.get(file.suffix, 'text')}", file.read_text(encoding="utf-8"), "``````", ""]
    return "\n".join(parts)
