"""Tables laid out like the paper's, with its rows, and the harness whose results stand in them."""

import io
import json
import re
import sys

import pandas as pd
import pytest
from rich.cells import cell_len
from rich.console import Console

from sapo_trl.evaluation import published
from sapo_trl.evaluation.command import main
from sapo_trl.evaluation.lmms_eval import TASKS, HarnessError, harness_command, read_harness_results
from sapo_trl.evaluation.settings import EvalArguments
from sapo_trl.evaluation.tables import Cell, ResultTable, Row, as_json, as_latex, as_markdown, as_rich, make_tables
from tests.evaluation.evaluation_run import TOYS


MAIN_TITLES = ["Geo3K", "LogicVista", "MathVerse", "WeMath", "MathVista", "DynaMath", "Avg"]


def entry(value, title="T", headline="accuracy", problems=601, belonging=601, scorers=("rules",), n=1, note=""):
    return {
        "title": title,
        "headline": headline,
        "scoring_note": note,
        "problems": problems,
        "belonging": belonging,
        "n": n,
        "metrics": {headline: {"value": value, "low": value - 0.04, "high": value + 0.04}},
        "repeated": {
            f"avg@{n}": {"value": value, "low": 0.1, "high": 0.9},
            "pass@2": {"value": 0.7, "low": 0, "high": 1},
        },
        "scorers": dict.fromkeys(scorers, problems),
        "errors": 0,
    }


def run(benchmarks, name="Qwen2.5-VL-3B-Instruct"):
    return {"name": name, "model": f"Qwen/{name}", "settings_line": "", "benchmarks": benchmarks}


def all_main(**overrides):
    values = dict(zip(published.MAIN_COLUMNS, (0.4, 0.3, 0.2, 0.1, 0.6, 0.15), strict=True))
    return {name: entry(value, title=name, **overrides) for name, value in values.items()}


def test_no_name_is_split_at_80_columns():
    (table, *_) = make_tables([run(all_main()), run(all_main(), name="Qwen2.5-VL-7B-sapo-official")])
    printed = io.StringIO()
    Console(file=printed, width=80).print(as_rich(table, 80))
    lines = printed.getvalue().splitlines()
    names = {row.name for row in table.rows}
    first = {line[: max(map(len, names))].strip() for line in lines if "rules" in line or "paper" in line.lower()}
    assert names <= first
    words = printed.getvalue().split()
    assert [title for title in table.columns if title not in words] == []
    # The wide table has the same numbers.
    wide = io.StringIO()
    Console(file=wide, width=400).print(as_rich(table))
    number = re.compile(r"\d+\.\d\d")
    assert sorted(number.findall(printed.getvalue())) == sorted(number.findall(wide.getvalue()))


@pytest.mark.parametrize("width", [60, 72, 79, 80, 81, 100, 120])
@pytest.mark.parametrize(
    ("name", "scorer"),
    [
        ("short", "rules"),
        ("Qwen2.5-VL-3B-Instruct + geo3k_qwen2.5_vl_3b_lora", "rules, then judge Qwen2.5-72B-Instruct-AWQ"),
        ("模型" * 12, "rules"),
        *(("n" * length, "rules") for length in range(20, 44, 3)),
    ],
)
def test_nothing_is_split_at_any_width(name, scorer, width):
    rows = [Row("GRPO, 3B", "paper", [Cell(41.5)] * 7), Row(name, scorer, [Cell(12.34, 10.0, 20.0)] * 7)]
    printed = io.StringIO()
    Console(file=printed, width=width).print(as_rich(ResultTable("Title", MAIN_TITLES, rows, []), width))
    lines = printed.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    text = printed.getvalue()
    assert text.count("10.0 to 20.0") == text.count("12.34") == 7 and text.count("41.50") == 7
    assert [word for word in [*MAIN_TITLES, "GRPO, 3B", name] if word not in text] == []
    assert " ".join(text.split()).count(scorer) >= 1


@pytest.mark.parametrize("size", ["3B", "7B"])
def test_the_papers_averages_are_those_of_its_numbers(size):
    assert published.MAIN[size].keys() == published.MAIN_AVERAGES[size].keys()
    for name, values in published.MAIN[size].items():
        assert len(values) == len(published.MAIN_COLUMNS)
        # 37.94 is printed for 37.945.
        assert sum(values) / 6 == pytest.approx(published.MAIN_AVERAGES[size][name], abs=0.0051)


def test_sizes_of_models():
    names = ["Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl-7b-sapo", "Qwen3-VL-4B-Thinking", "Qwen-1.7B", "m-13b", "7B"]
    assert [published.size_of(name) for name in names] == ["3B", "7B", None, None, None, "7B"]


def test_the_papers_layout_with_its_rows_above_ours():
    (table,) = make_tables([run(all_main())])
    assert table.columns == MAIN_TITLES
    assert [row.name for row in table.rows] == [
        *["Qwen2.5-VL-3B", "GRPO, 3B", "PPO, 3B", "VC-PPO, 3B", "SAPO, 3B"],
        "Qwen2.5-VL-3B-Instruct",
    ]
    assert [cell.value for cell in table.rows[4].cells] == [46.26, 39.6, 37.56, 36.19, 65.4, 16.37, 40.23]
    ours = table.rows[-1]
    assert ours.scorer == "rules" and table.rows[0].scorer == "paper"
    assert ours.cells[-1].value == pytest.approx((40 + 30 + 20 + 10 + 60 + 15) / 6)
    assert str(ours.cells[0]) == "40.00 (36.0 to 44.0)"
    assert "LogicVista accuracy" in table.notes[2]


def test_no_average_of_a_part_and_marks_for_parts():
    benchmarks = all_main()
    del benchmarks["wemath"]
    (table,) = make_tables([run(benchmarks)])
    assert table.rows[-1].cells[3] is None and table.rows[-1].cells[-1] is None
    benchmarks = all_main() | {"geo3k": entry(0.4, title="Geo3K", problems=100)}
    (table,) = make_tables([run(benchmarks)])
    assert str(table.rows[-1].cells[0]) == "40.00† (36.0 to 44.0)"
    assert table.rows[-1].cells[-1].mark == "†"
    assert any(note.startswith("† ") and "100 of 601 problems" in note for note in table.notes)


def test_several_runs_scorers_and_other_benchmarks():
    judged = run(all_main(scorers=("judge gpt-4o", "rules")), name="sapo-7b")
    other = run({"gsm8k": entry(0.5, n=4), "mine": entry(0.25, title="Mine")}, name="tiny")
    main_table, text, others = make_tables([judged, other])
    assert [row.name for row in main_table.rows][-2:] == ["SAPO, 7B", "sapo-7b"]
    assert main_table.rows[-1].scorer == "rules, then judge gpt-4o"
    assert {row.name for row in main_table.rows if row.scorer == "paper"} >= {"SAPO, 7B", "Qwen2.5-VL-7B"}
    assert not any("3B" in row.name for row in main_table.rows)
    assert text.columns == ["GSM8K", "MATH500"] and "mean of 4 generations" in text.notes[1]
    assert "tiny, T: avg@4 50.00 (10.0 to 90.0), pass@2 70.00 (0.0 to 100.0)." in text.notes
    assert not any("pass@" in note for note in main_table.notes)  # of one generation each
    assert others.columns == ["Mine"] and others.rows[0].cells[0].value == 25.0


def test_general_benchmarks_stand_beside_the_papers_average():
    (table,) = make_tables([run({"mmstar": entry(0.6)}, name="x-7b")])
    assert table.title == "General"
    assert [(row.name, row.cells[-1].value) for row in table.rows[:-1]] == [
        ("Qwen2.5-VL-7B", 71.24),
        ("GRPO, 7B", 71.26),
        ("PPO, 7B", 71.08),
        ("SAPO, 7B", 72.36),
    ]


def test_markdown_and_latex_say_the_same_and_escape_names():
    tables = make_tables([run(all_main(), name="a|b_3b & 100%")])
    lines = as_markdown(tables).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert table[-1].startswith("| a\\|b\\_3b \\& 100% | rules | 40.00 (36.0 to 44.0) |")
    latex = as_latex(tables)
    assert r"a|b\_3b \& 100\%" in latex and r"\toprule" in latex and "46.26" in latex
    rows = json.loads(json.dumps(as_json(tables)))[0]["rows"]
    assert rows[-1]["cells"][0] == pytest.approx({"value": 40.0, "low": 36.0, "high": 44.0, "mark": ""})


HOSTILE_NAME = "a|b\n<img src=x onerror=alert(1)> [x](javascript:1) **b** `c` \u202e\x1b[2J &lt; m-3b"


def test_a_models_name_is_text_everywhere():
    hostile = run(all_main(scorers=(HOSTILE_NAME,), problems=1, note=HOSTILE_NAME), name=HOSTILE_NAME)
    hostile["benchmarks"]["mine"] = entry(0.5, title=HOSTILE_NAME, n=2)
    tables = make_tables([hostile])
    markdown = as_markdown(tables)
    # No mark without a backslash before it, and each table keeps its columns.
    text = "\n".join(line for line in markdown.splitlines() if "onerror" in line)
    assert not re.search(r"(?<!\\)[<>`*&\[\]]", text) and text.count("\\<img") >= 8
    for table in tables:
        block = markdown.split(f"## {table.title}\n\n")[1].split("\n\n")[0]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()} == {len(table.columns) + 3}
    printed = io.StringIO()
    for table in tables:
        Console(file=printed, width=400).print(as_rich(table))
    for written in (markdown, as_latex(tables), json.dumps(as_json(tables), ensure_ascii=False), printed.getvalue()):
        assert "⟨U+202E⟩⟨U+001B⟩" in written and not {"\u202e", "\x1b"} & set(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "the content must be an object, got []"),
        ({"benchmarks": None}, "`benchmarks` must be an object, got None"),
        ({"name": 3}, "`name` must be a text, got 3"),
        ({"benchmarks": {"mine": {"title": "T"}}}, "`benchmarks.mine.headline` is missing"),
        ({"benchmarks": {"mine": entry(0.5) | {"headline": "other"}}}, "`benchmarks.mine.metrics.other` is missing"),
        ({"benchmarks": {"mine": entry(0.5) | {"n": "4"}}}, "`benchmarks.mine.n` must be an integer, got '4'"),
        (
            {"benchmarks": {"mine": entry(0.5) | {"metrics": {"accuracy": {"value": "x", "low": 0, "high": 1}}}}},
            "`benchmarks.mine.metrics.accuracy.value` must be a number, got 'x'",
        ),
    ],
)
def test_an_old_or_broken_file_is_named(change, message, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(change if isinstance(change, str) else json.dumps(run({"mine": entry(0.5)}) | change))
    assert main(["table", str(tmp_path)], TOYS) == 2
    error = capsys.readouterr().err
    assert f"{path}: {message}" in error and error.count("\n") == 1


def test_table_of_several_run_folders(tmp_path, capsys):
    for name, value in (("one", 0.4), ("two", 0.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(run({"geo3k": entry(value, "Geo3K")}, name=name)))
    printed = io.StringIO()
    arguments = ["table", str(tmp_path / "one"), str(tmp_path / "two"), "--output_dir", str(tmp_path / "both")]
    assert main(arguments, TOYS, Console(file=printed, width=120)) == 0
    assert "40.00" in printed.getvalue() and "50.00" in printed.getvalue()
    assert "| two | rules | 50.00 (46.0 to 54.0) |" in (tmp_path / "both" / "table.md").read_text()
    printed = io.StringIO()
    assert main([*arguments, "--format", "json"], TOYS, Console(file=printed)) == 0
    assert json.loads(printed.getvalue())[0]["title"] == "Multi-modal reasoning"
    assert main(["table", str(tmp_path)], TOYS) == 2
    assert "has no results.json" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- harness


def harness_arguments(**settings):
    settings = {"harness": "lmms-eval", "harness_python": "/env/bin/python", "backend": "vllm", **settings}
    return EvalArguments(model="Qwen/Qwen2.5-VL-3B-Instruct", **settings)


def test_the_harness_command_line(tmp_path):
    command = harness_command(harness_arguments(limit=8, max_pixels=10**6), ["mathvista", "mmstar"], tmp_path)
    assert command[:3] == ["/env/bin/python", "-m", "lmms_eval"]
    options = dict(zip(command[3:-3:2], command[4:-2:2], strict=False))
    assert options["--model"] == "vllm"
    assert options["--model_args"] == "model=Qwen/Qwen2.5-VL-3B-Instruct,max_pixels=1000000"
    assert options["--tasks"] == "mathvista_testmini_cot_reasoning,mmstar"
    assert options["--gen_kwargs"] == "temperature=0.6,top_p=0.95,do_sample=True,max_new_tokens=2048"
    assert options["--output_path"] == str(tmp_path)
    assert command[-2:] == ["--limit", "8"] and "--log_samples" in command
    other = harness_command(harness_arguments(backend="transformers", temperature=0.0), ["gsm8k"], tmp_path)
    assert "pretrained=Qwen/Qwen2.5-VL-3B-Instruct" in other and "do_sample=False" in " ".join(other)


@pytest.mark.parametrize(
    ("settings", "names", "message"),
    [
        ({"harness_python": None}, ["mmstar"], "needs `harness_python`"),
        ({}, ["geo3k"], "has no task for geo3k"),
        ({}, ["math500"], "has no task for math500"),
        ({"n": 4}, ["mmstar"], "`n` must be 1, got 4"),
        ({"adapter": "a"}, ["mmstar"], "does not take `adapter`"),
    ],
)
def test_what_the_harness_cannot_do(settings, names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        harness_command(harness_arguments(**settings), names, tmp_path)


def test_a_model_cannot_smuggle_in_arguments(tmp_path):
    arguments = EvalArguments(model="m,trust_remote_code=True", harness="lmms-eval", harness_python="python")
    with pytest.raises(ValueError, match="no names with commas"):
        harness_command(arguments, ["mmstar"], tmp_path)


def harness_results(**results):
    """Of lmms-eval 0.7.3's form, with what it writes besides."""
    samples = {task: {"original": 1000, "effective": 200} for task in results}
    return {"results": results, "configs": {}, "n-samples": samples, "lmms_eval_version": "0.7.3", "date": "x"}


def test_reading_the_harness_results():
    content = harness_results(
        mmbench_en_dev_static={"alias": "m", "gpt_eval_score,none": 81.5, "gpt_eval_score_stderr,none": "N/A"},
        gsm8k_cot_zeroshot={
            "exact_match,strict-match": 0.1,
            "exact_match,flexible-extract": 0.7,
            "exact_match_stderr,flexible-extract": 0.05,
        },
    )
    content["results"]["wemath_testmini_reasoning"] = {"acc_score,none": 0.5, "wemath_strict,none": "36.19%"}
    found = read_harness_results(content, ["mmbench", "gsm8k", "wemath"])
    assert found["wemath"]["metrics"]["strict"]["value"] == pytest.approx(0.3619)
    assert found["mmbench"]["metrics"] == {"accuracy": {"value": 0.815, "low": None, "high": None}}
    assert found["gsm8k"]["metrics"]["accuracy"]["value"] == 0.7
    assert found["gsm8k"]["metrics"]["accuracy"]["high"] == pytest.approx(0.798)
    assert found["gsm8k"]["scorers"] == {"lmms-eval 0.7.3": 200}
    with pytest.raises(HarnessError, match=r"no number for 'average,none' of 'mmstar', but None"):
        read_harness_results(content, ["mmstar"])


STUB = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
assert arguments[:2] == ["-m", "lmms_eval"], arguments
given = dict(zip(arguments[2::2], arguments[3::2]))
if given["--seed"] == "13":
    sys.exit(3)
folder = pathlib.Path(arguments[arguments.index("--output_path") + 1], "Qwen__Qwen2.5-VL-3B-Instruct")
folder.mkdir(parents=True)
(folder / "20261121_101500_results.json").write_text(json.dumps({content}))
"""


def test_a_run_by_the_harness(tmp_path, capsys):
    """The program on disk stands for lmms-eval's Python: it checks what it is called with, and writes its file."""
    stub = tmp_path / "python"
    content = harness_results(mmstar={"average,none": 0.614, "average_stderr,none": "N/A"})
    stub.write_text(STUB.format(python=sys.executable, content=content))
    stub.chmod(0o755)
    arguments = ["--model", "Qwen/Qwen2.5-VL-3B-Instruct", "--benchmarks", "mmstar", "--harness", "lmms-eval"]
    arguments += ["--harness_python", str(stub), "--output_dir", str(tmp_path / "run")]
    benchmarks = {"mmstar": TOYS["text"]}
    assert main(arguments, benchmarks, Console(file=io.StringIO())) == 0
    text = (tmp_path / "run" / "table.md").read_text()
    assert "| lmms-eval 0.7.3 |" in text and "61.40†" in text and "task 'mmstar'" in text
    assert main([*arguments, "--seed", "13"], benchmarks) == 1
    assert "exit code 3" in capsys.readouterr().err
    assert main([*arguments, "--harness_python", "/no/such/python"], benchmarks) == 1
    assert "cannot be run" in capsys.readouterr().err


def test_every_task_is_of_a_benchmark_in_a_table():
    columns = {*published.MAIN_COLUMNS, *published.GENERAL_COLUMNS, *published.TEXT_COLUMNS}
    assert TASKS.keys() == columns - {"geo3k", "math500"}
    assert published.METRICS.keys() == columns
    assert not pd.Index([task.name for task in TASKS.values()]).duplicated().any()
