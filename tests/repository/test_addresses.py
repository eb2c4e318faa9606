"""No address that a reader meets is dead: placeholders, accounts that cannot exist, files that are not there."""

import json
import re
import runpy
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

from tests.repository.test_docs import anchors


ROOT = Path(__file__).parents[2]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
FOLDERS = ("docs", "notebooks", "examples", "benchmarks", "trainer_configs", "sapo_trl")
ENDINGS = {".md", ".ipynb", ".py", ".toml", ".yml", ".yaml", ".cff", ".j2", ".txt"}
FILES = sorted(
    path
    for path in [*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    if path.suffix in ENDINGS and path.is_file()
)
PAGES = [path for path in FILES if path.suffix in {".md", ".ipynb"}]

# GitHub: letters, digits and single hyphens, at most 39 characters.
ACCOUNT = re.compile(r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,38}")
PLACEHOLDER = re.compile(r"your[-_]|<account>|<user>|USERNAME|example-org", re.IGNORECASE)
# Links within a site of ours, and addresses in examples of hostile data.
ADDRESS = re.compile(r"(?:https?://|git\+https://)[^\s\"'`<>\\)\]}]+")
ACCOUNT_HOSTS = re.compile(
    r"(?:https?://|git\+https://)(?:www\.)?(?:github\.com|raw\.githubusercontent\.com"
    r"|colab\.research\.google\.com/github)/([^/\s\"'`<>\\)\]}]+)"
)


def text_of(path: Path) -> str:
    """A file's text; of a notebook, the text of its cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def dead(text: str) -> list[str]:
    """The addresses of a text that cannot exist."""
    impossible = [found[0] for found in ACCOUNT_HOSTS.finditer(text) if not ACCOUNT.fullmatch(found[1])]
    return impossible + [address for address in ADDRESS.findall(text) if PLACEHOLDER.search(address)]


def test_the_files_are_found():
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert {"README.md", "pyproject.toml", "notebooks/01_quickstart.ipynb", "docs/install.md", "mkdocs.yml"} <= names


@pytest.mark.parametrize(
    "address",
    [
        "https://github.com/your_account/sapo_trl",
        "https://colab.research.google.com/github/some_one/sapo_trl/blob/main/a.ipynb",
        "pip install git+https://github.com/-a/b",
        "https://your-name.github.io/sapo_trl",
    ],
)
def test_a_dead_address_is_seen(address):
    assert dead(f"[a]({address})") and not dead("[a](https://github.com/huggingface/trl)")


def test_no_address_is_dead():
    assert {str(path.relative_to(ROOT)): found for path in FILES if (found := dead(text_of(path)))} == {}


def test_no_badge_and_no_cell_needs_an_address_that_is_not_set():
    if "Repository" in URLS:
        pytest.skip("the repository has an address")
    texts = {path.relative_to(ROOT).as_posix(): text_of(path) for path in PAGES}
    wanted = re.compile(r"colab-badge|shields\.io|git\+https|git clone|github\.com/[^/\s]+/sapo_trl\b")
    assert {name: found for name, text in texts.items() if (found := wanted.findall(text))} == {}


@pytest.mark.parametrize(
    "path", [path for path in PAGES if path.suffix == ".ipynb"] + [ROOT / "notebooks" / "README.md"], ids=str
)
def test_links_of_notebooks_lead_to_files(path):
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", text_of(path))
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        assert (path.parent / file).is_file(), link
        if anchor:
            assert anchor in anchors(path.parent / file), link


def description(monkeypatch, repository: str | None) -> str:
    """The text that a package index shows, by `setup.py`."""
    given: dict = {}
    urls = {name: address for name, address in URLS.items() if name != "Repository"}
    urls |= {} if repository is None else {"Repository": repository}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.setattr(tomllib, "loads", lambda text: {"project": {"urls": urls}})
    runpy.run_path(str(ROOT / "setup.py"))
    return given["long_description"]


def addresses(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)", text)


def test_without_an_address_the_description_has_no_relative_link(monkeypatch):
    text = description(monkeypatch, None)
    assert "## " in text and "Segment-Aligned" in text
    found = addresses(text)
    assert found and [address for address in found if not address.startswith(("https://", "http://", "#"))] == []
    assert "![" not in text and "[]" not in text


def test_with_an_address_each_link_of_the_description_leads_to_a_file(monkeypatch):
    repository = "https://github.com/someone/sapo_trl"
    found = addresses(description(monkeypatch, repository))
    assert [address for address in found if not address.startswith(("https://", "http://", "#"))] == []
    own = [address for address in found if address.startswith(repository)]
    assert len(own) > 10
    for address in own:
        path = re.sub(r"^/(blob|raw)/main/", "", address.removeprefix(repository)).split("#")[0]
        assert (ROOT / path).exists(), address


def test_links_of_notebooks_on_the_site(monkeypatch):
    # The site's libraries need not be here: the function on links uses none of them.
    for name in ("mkdocs.config.defaults", "mkdocs.structure.files", "nbconvert"):
        library = SimpleNamespace(MkDocsConfig=object, File=object, Files=object, MarkdownExporter=object)
        monkeypatch.setitem(sys.modules, name, library)
    pages = runpy.run_path(str(ROOT / "docs" / "site" / "notebooks.py"))
    text = "[a](../docs/a.md#b) [c](02_c.ipynb) [d](../trainer_configs/d.yaml) [e](https://e.org/../docs/e)"
    expected = "[a](../a.md#b) [c](02_c.md) [d](../../trainer_configs/d.yaml) [e](https://e.org/../docs/e)"
    assert pages["_within_the_site"](text) == expected
