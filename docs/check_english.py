"""
Finds constructions that make a reader start a sentence again: `python docs/check_english.py PATH...`.

- A free relative: `what is given is checked`. Write "the given value is checked".
- A pronoun where the noun would be clearer: `those of`, `that of`, `the ones that`.
- A relative in front, `of which` or `for which`; and `in the place of`. Write two sentences; write "instead of".

The check reads Markdown pages and notebooks, the comments and strings of Python and JavaScript, the text of HTML
templates and the comments of YAML and CSS. It skips code blocks and `code`. It prints `file:line: phrase` and exits
with 1 if it found any.
"""

import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path


Passage = tuple[int, str]  # the number of its first line; its text, as many lines as the file has there

_AFTER = "that|which|who|whose|whom|of|in|with|without|from|for|at|on|to|by|under|above|below|behind|before|after"
BANNED = {
    "free relative": re.compile(r"\b(?:what(?:ever)?|whoever|that which)\s+[\w`'*]+", re.IGNORECASE),
    "pronoun for a noun": re.compile(
        rf"\b(?:(?:those|these)\s+(?:{_AFTER})\b|that\s+of\b|the\s+ones\b|ones\s+(?:that|which|who|whose|of)\b"
        rf"|the\s+one\s+(?:{_AFTER})\b)",
        re.IGNORECASE,
    ),
    "relative in front": re.compile(r"\b(?:of|for)\s+(?:which|whom|whose)\b|\bin\s+the\s+place\s+of\b", re.IGNORECASE),
}
# An indirect question reads well: "the error says what is wrong". So does an infinitive: "what to do next".
_ASKS = (
    r"(?:say|tell|describe|know|ask|explain|decide|show|see|learn|find out)(?:s|es|ed|ing|n)?|said|told|knew|no matter"
)
INDIRECT_QUESTION = re.compile(rf"\b(?:{_ASKS})(?:\s+(?:you|us|me|it|them|exactly))?\s+$", re.IGNORECASE)
INFINITIVE = re.compile(r"what\s+(?:to|if)$", re.IGNORECASE)


def found(text: str) -> Iterator[tuple[int, str]]:
    """Offset and words of every banned phrase in a text."""
    for name, pattern in BANNED.items():
        for match in pattern.finditer(text):
            if name != "free relative" or not _reads_well(text, match):
                yield match.start(), " ".join(match[0].split())


def _reads_well(text: str, match: re.Match) -> bool:
    if INFINITIVE.match(match[0]) or INDIRECT_QUESTION.search(text[: match.start()]):
        return True
    return _is_question(text[match.start() :])


def _is_question(rest: str) -> bool:
    """Whether a sentence that ends like this is a question."""
    end = re.search(r"[.?!:;](?=[\s\"'*)|]|$)|\n\s*\n", rest)
    return end is not None and end[0] == "?"


# ------------------------------------------------------------------------------------------------- the prose of a file


def _blank(pattern: str, text: str, flags: int = 0, with_: str = " ") -> str:
    """Overwrites every match, so that lines and offsets stay."""
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", with_, match[0]), text, flags=flags)


def _without_code(text: str) -> str:
    text = _blank(r"``[^`]+``|`[^`]+`", text, with_="x")
    return _blank(r"\]\([^)\s]*\)|https?://\S+", text)


def markdown(text: str) -> Iterator[Passage]:
    """Paragraphs, outside of code blocks."""
    text = _blank(r"^[ \t]*```.*?^[ \t]*```[ \t]*$", text, re.MULTILINE | re.DOTALL)
    text = _without_code(text)
    for match in re.finditer(r"(?:[^\n]*\S[^\n]*\n?)+", text):
        yield text.count("\n", 0, match.start()) + 1, match[0]


def notebook(text: str) -> Iterator[Passage]:
    """Markdown cells, and the comments and strings of code cells."""
    at = 0
    for cell in json.loads(text)["cells"]:
        if not cell["source"]:
            continue
        at = text.index(json.dumps(cell["source"][0], ensure_ascii=False), at)
        first = text.count("\n", 0, at) + 1
        read = markdown if cell["cell_type"] == "markdown" else python
        # IPython's commands are no Python.
        source = re.sub(r"^([ \t]*)[%!].*", r"\1pass", "".join(cell["source"]), flags=re.MULTILINE)
        for line, passage in read(source):
            yield first + line - 1, passage


def python(text: str) -> Iterator[Passage]:
    """Comments, docstrings and other strings: errors, help, labels."""
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("#")
    yield from ((line, _without_code(words)) for line, words in _joined(comments))
    lines = text.encode().splitlines(keepends=True)
    for node in _strings(ast.parse(text)):
        part = lines[node.lineno - 1 : node.end_lineno]
        part[-1] = part[-1][: node.end_col_offset]
        part[0] = part[0][node.col_offset :]
        raw = b"".join(part).decode()
        raw = _blank(r"(?<=[\"'])\s*\n\s*[a-zA-Z]?[\"']", raw).replace("\\n", "  ")
        raw = raw if '"""' in raw else re.sub(r"[\"'](?= *\n)", " ", raw)
        raw = _blank(r"(?<!\{)\{[^{}\n]*\}", raw, with_="x")
        for line, words in _paragraphs(raw):
            yield node.lineno + line, _without_code(words)


def _strings(node: ast.AST) -> Iterator[ast.expr]:
    """Strings as they stand in the source: adjacent ones are one, an f-string is one."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.JoinedStr) or (isinstance(child, ast.Constant) and isinstance(child.value, str)):
            yield child
        else:
            yield from _strings(child)


def _paragraphs(text: str) -> Iterator[Passage]:
    for match in re.finditer(r"(?:[^\n]*\S[^\n]*\n?)+", text):
        yield text.count("\n", 0, match.start()), match[0]


def _joined(comments: dict[int, str]) -> Iterator[Passage]:
    """Comments on consecutive lines as one passage."""
    for line, words in comments.items():
        if line - 1 in comments:
            continue
        passage = [words]
        while line + len(passage) in comments:
            passage.append(comments[line + len(passage)])
        yield line, "\n".join(passage)


def javascript(text: str) -> Iterator[Passage]:
    for match in re.finditer(
        r"/\*.*?\*/|(?<![:\"'])//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`", text, re.DOTALL
    ):
        words = _blank(r"\$\{[^}]*\}", match[0].strip("`"), with_="x")
        yield text.count("\n", 0, match.start()) + 1, _without_code(words)


def template(text: str) -> Iterator[Passage]:
    text = _blank(r"<(?:script|style)\b.*?</(?:script|style)>|<[^>]*>|\{%.*?%\}", text, re.DOTALL)
    text = _blank(r"\{\{.*?\}\}", text, re.DOTALL, with_="x")
    yield from ((line + 1, _without_code(words)) for line, words in _paragraphs(text))


def yaml(text: str) -> Iterator[Passage]:
    comments = {
        number: match[1]
        for number, line in enumerate(text.splitlines(), start=1)
        if (match := re.search(r"(?:^|\s)#+(.*)", line))
    }
    yield from ((line, _without_code(words)) for line, words in _joined(comments))


READERS = {
    ".md": markdown,
    ".ipynb": notebook,
    ".py": python,
    ".js": javascript,
    ".jinja": template,
    ".j2": template,
    ".html": template,
    ".yaml": yaml,
    ".yml": yaml,
    ".css": javascript,
}


def findings(path: Path) -> list[tuple[int, str]]:
    """Line and words of every banned phrase in a file."""
    passages = READERS[path.suffix](path.read_text(encoding="utf-8"))
    return sorted(
        (line + text.count("\n", 0, offset), phrase) for line, text in passages for offset, phrase in found(text)
    )


def main(paths: list[str]) -> int:
    """Check files, and the files in folders; returns the exit status."""
    status = 0
    for path in map(Path, paths):
        files = sorted(file for file in path.rglob("*") if file.suffix in READERS) if path.is_dir() else [path]
        for file in files:
            for line, phrase in findings(file):
                print(f"{file}:{line}: {phrase}")
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
