"""
A hook of mkdocs: the viewer's page of a run of the demo, beside `docs/demo_run.md`.

The repository has the recording, and the page is made anew from it with each build of the site.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from sapo_trl.recordings import read_recording
from sapo_trl.viewer import write_page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page, which loads nothing from elsewhere."""
    recording = read_recording(Path(config.docs_dir).parent / "benchmarks" / "results" / "demo", "demo")
    with TemporaryDirectory() as folder:
        page = Path(folder) / "view.html"
        write_page([recording], page)
        files.append(File.generated(config, "demo_run/view.html", content=page.read_text(encoding="utf-8")))
    return files
