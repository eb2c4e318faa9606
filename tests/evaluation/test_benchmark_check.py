"""Rows are read and their golds are tried before anything is generated."""

import io
import re

import pytest
from datasets import Dataset, Features
from rich.console import Console

from sapo_trl.evaluation.benchmarks import BENCHMARKS
from sapo_trl.evaluation.command import main
from sapo_trl.evaluation.rows import load_rows
from tests.evaluation.benchmark_rows import FEATURES, ROWS, dynamath_row, mathvista_row, wemath_row


def table(folder, name: str, rows: list[dict]) -> str:
    """The path of a table with rows of a benchmark."""
    features = Features(FEATURES[name])
    path = folder / f"{name}.parquet"
    Dataset.from_list([dict.fromkeys(features) | row for row in rows], features=features).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_published_forms_pass(name, tmp_path):
    rows = load_rows(BENCHMARKS[name], table(tmp_path, name, ROWS[name]))
    read: list[int] = []
    rows.check(rows.numbers, lambda: read.append(1))
    assert len(read) == len(rows.numbers) > 0


@pytest.mark.parametrize(
    ("name", "row", "fault"),
    [
        ("dynamath", dynamath_row("465", "q", "49", "set"), r"row 1 of .* \(id '465'\).*`answer_type`.*got 'set'"),
        ("dynamath", dynamath_row("7", "q", "", "float"), r"the problem '7/1' of .* has no answer, got ''"),
        ("dynamath", dynamath_row("7", "q", "around two", "float"), "has the answer 'around two', but"),
        ("wemath", wemath_row("9", "2steps_1", ""), r"row 1 of .* \(ID '9'\).*letter from A to H, got ''"),
        ("mathvista", mathvista_row("31", "q", "[1, x]", "list"), r"the problem '31' of .* has the answer '\[1, x\]'"),
        ("mathvista", mathvista_row("31", "q", "x", "integer"), "the problem '31' of .* has the answer 'x'"),
        ("gsm8k", {"question": "q", "answer": "####"}, "the problem '1' of .* has no answer, got ''"),
        ("geo3k", ROWS["geo3k"][0] | {"answer": None, "id": 77}, "the problem '1' of .* has no answer"),
        ("mmmu", ROWS["mmmu"][1] | {"answer": "[]"}, r"\(id .validation_Architecture.*must not be empty, got '\[\]'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_row_that_cannot_be_scored_stops_the_evaluation_before_it_generates(name, row, fault, tmp_path, capsys):
    """Before the model is looked up, too: there is none here."""
    path, out = table(tmp_path, name, [ROWS[name][0], row]), tmp_path / "out"
    settings = ["--model", str(tmp_path / "no-model"), "--benchmarks", f"{name}={path}", "--output_dir", str(out)]
    assert main(settings, BENCHMARKS, Console(file=io.StringIO())) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert re.search(fault, message), message
    assert f"{name} has rows that cannot be used: 1. Nothing was generated." in message
    assert not list(out.rglob("*.parquet")) and not (out / "eval.json").exists()


def test_all_faults_are_counted(tmp_path):
    rows = [dynamath_row(str(i), "q", "1", "set" if i % 2 else "float") for i in range(20)]
    loaded = load_rows(BENCHMARKS["dynamath"], table(tmp_path, "dynamath", rows))
    with pytest.raises(
        ValueError, match=r"dynamath has rows that cannot be used: 10.*row 1 .*row 9 .* And 5 more\."
    ) as error:
        loaded.check(loaded.numbers)
    assert "row 11" not in str(error.value)
    loaded.check(range(0, 20, 2))
