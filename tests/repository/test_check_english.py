"""docs/check_english.py: sentences that it must find, sentences that it must leave alone, and every kind of file."""

import importlib.util
import json
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("check_english", ROOT / "docs" / "check_english.py")
check_english = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_english)


@pytest.mark.parametrize(
    ("sentence", "phrase"),
    [
        ("Prints what is given.", "what is"),
        ("It costs what\nthey cost.", "what they"),
        ("What has to be above zero is checked.", "What has"),
        ("Whoever measures it stops.", "Whoever measures"),
        ("Is it so? It keeps what remains.", "what remains"),
        ("The losses are those of TRL.", "those of"),
        ("A value like that of the prompt.", "that of"),
        ("Drops the ones that fail.", "the ones"),
        ("Only those without an image.", "those without"),
        ("The model, of which nothing is kept.", "of which"),
        ("Rows for which there is no reward.", "for which"),
        ("The user, of whom nothing is asked.", "of whom"),
        ("This stands in the place of a noun.", "in the place of"),
    ],
)
def test_bad_sentences(sentence, phrase):
    assert [words for _, words in check_english.found(sentence)] == [phrase]


@pytest.mark.parametrize(
    "sentence",
    [
        "What is a segment?",
        "## What cannot be combined?",
        "The error says what is wrong.",
        "It shows you what each setting does.",
        "What to do when a run stops.",
        "No matter what happens, the file is closed.",
        "| What | Where |",
        "Those rewards are kept, and these are dropped.",
        "The tokens at which it cuts.",
        "It prints that the run has ended.",
        "Use this algorithm instead of the file's.",
        "Whatever.",
    ],
)
def test_good_sentences(sentence):
    assert list(check_english.found(sentence)) == []


def test_a_question_ends_with_its_sentence():
    """The question mark of a later sentence excuses nothing."""
    assert len(list(check_english.found("It keeps what remains. Is that all?"))) == 1


BAD = "keeps what is given"
FILES = {
    "page.md": (f"# Title\n\n```text\n{BAD}\n```\n\nIt `{BAD}` here.\n\nIt\n{BAD}.\n", [10]),
    "code.py": (
        f'"""{BAD}"""\n\n\ndef f(x):\n    # {BAD}\n    # and more\n    what = x  # no prose\n'
        f'    raise ValueError(\n        f"{{what}} is bad: it "\n        "{BAD} of `what is`"\n    )\n\n\n'
        f'D = {{"é": "{BAD}", "what": what}}\n',
        [1, 5, 10, 14],
    ),
    "page.js": (f'// see https://x.y/what\nlet what = 1; // {BAD}\nconst s = "{BAD}";\n/* one\n{BAD} */\n', [2, 3, 5]),
    "page.html.jinja": (f"<p title='x'>It\n{BAD}</p>\n{{{{ what }}}} {{# {BAD} #}}\n<script>{BAD}</script>\n", [2, 3]),
    "run.yaml": (f"# it\n# {BAD}\nwhat: is # {BAD}\n", [2, 3]),
}


@pytest.mark.parametrize("name", FILES)
def test_prose_of_every_kind_of_file(name, tmp_path, capsys):
    text, lines = FILES[name]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert [(line, phrase) for line, phrase in check_english.findings(path)] == [(line, "what is") for line in lines]
    assert check_english.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [f"{path}:{line}: what is" for line in lines]


def test_notebooks(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "It ", BAD]},
        {"cell_type": "code", "source": ["if True:\n", "    %pip install x\n", f"# {BAD}\n", "what = 1\n"]},
        {"cell_type": "code", "source": []},
    ]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": cells}, indent=1), encoding="utf-8")
    text = path.read_text().splitlines()
    found = check_english.findings(path)
    assert [phrase for _, phrase in found] == ["what is", "what is"]
    assert BAD in text[found[1][0] - 1]


def test_a_clean_file_passes(tmp_path, capsys):
    (tmp_path / "page.md").write_text("The given value is checked.\n", encoding="utf-8")
    assert check_english.main([str(tmp_path / "page.md")]) == 0
    assert capsys.readouterr().out == ""


def test_the_check_itself_is_written_so():
    assert check_english.findings(ROOT / "docs" / "check_english.py") == []
