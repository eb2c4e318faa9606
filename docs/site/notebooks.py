"""
A hook of mkdocs: each notebook becomes a page.

`make docs` runs them into `build/notebooks` first. A notebook that is not there, or has changed since, is shown
without outputs. Links to files of the repository become links within the site, so that a strict build checks them.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, its pictures, and a page that lists them."""
    root = Path(config.docs_dir).parent
    listed = _within_the_site((root / "notebooks" / "README.md").read_text(encoding="utf-8"))
    files.append(File.generated(config, "notebooks/index.md", content=listed))
    for source in sorted((root / "notebooks").glob("*.ipynb")):
        executed = root / "build" / "notebooks" / source.name
        is_current = executed.exists() and executed.stat().st_mtime >= source.stat().st_mtime
        notebook = nbformat.read(executed if is_current else source, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = _within_the_site(cell.source)
            else:
                cell.outputs = [output for output in cell.outputs if not _is_noise(output)]
        text, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": source.stem})
        # Without a class tables look like the site's.
        text = text.replace('<table border="1" class="dataframe">', "<table>")
        files.append(File.generated(config, f"notebooks/{source.stem}.md", content=text))
        for name, picture in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def _is_noise(output: nbformat.NotebookNode) -> bool:
    """Whether it is progress, or a library's warning."""
    return output.get("name") == "stderr" or "<progress" in output.get("data", {}).get("text/html", "")


def _within_the_site(text: str) -> str:
    """Links as they are in `docs/notebooks/`, where the pages are: the notebooks lie beside `docs/`."""
    text = re.sub(r"(?<=\]\()(\w+)\.ipynb(?=\))", r"\1.md", text)
    text = re.sub(r"(?<=\]\()\.\./(?!docs/)", "../../", text)
    return text.replace("](../docs/", "](../")
