"""From rows of the published types to problems."""

import base64
import io
import json
import re

import pytest
from datasets import Features, load_dataset
from PIL import Image

from sapo_trl.data import to_prompts
from sapo_trl.evaluation.benchmark import Problem
from sapo_trl.evaluation.benchmarks import BENCHMARKS
from sapo_trl.evaluation.benchmarks.mmbench import convert_tsv
from sapo_trl.evaluation.benchmarks.mmmu import DISCIPLINES
from sapo_trl.evaluation.benchmarks.prompts import ask
from sapo_trl.evaluation.benchmarks.rows import to_image
from sapo_trl.evaluation.rows import load_rows
from tests.evaluation.benchmark_rows import (
    FEATURES,
    ROWS,
    dataset,
    dynamath_row,
    mathverse_row,
    mathvista_row,
    mmbench_row,
    mmstar_row,
    picture,
    wemath_row,
)


def problems(name: str, rows=None) -> list[Problem]:
    benchmark = BENCHMARKS[name]
    rows = ROWS[name] if rows is None else rows
    return [benchmark.to_problem(row, i) for i, row in enumerate(rows) if benchmark.keep(row)]


def blocks(problem: Problem) -> list[dict]:
    (message,) = problem.prompt
    assert message["role"] == "user"
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(problem: Problem) -> str:
    return "".join(block.get("text", "") for block in blocks(problem))


def test_all_benchmarks_are_there():
    assert set(BENCHMARKS) == set(FEATURES) == set(ROWS)
    assert all(name == benchmark.name for name, benchmark in BENCHMARKS.items())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_of_the_published_types(name, tmp_path):
    path = tmp_path / "rows.parquet"
    dataset(name).to_parquet(path)
    rows = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features == Features(FEATURES[name])
    read, direct = problems(name, rows), problems(name)
    assert read, "no row was kept"
    for problem, same in zip(read, direct, strict=True):
        assert (problem.id, problem.answer, problem.prompt) == (same.id, same.answer, same.prompt)
        assert [block["type"] for block in blocks(problem)].count("image") == len(problem.images)
        assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in problem.images)
        assert json.loads(json.dumps(problem.fields)) == problem.fields
        assert r"\boxed{}" in text_of(problem)
    assert len({problem.id for problem in read}) == len(read)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_column_is_named(name):
    benchmark, row = BENCHMARKS[name], ROWS[name][0]
    answer = {"dynamath": "ground_truth"}.get(name, "answer")
    with pytest.raises(ValueError, match=rf"Row 5 of {name} lacks the columns \['{answer}'\]"):
        benchmark.to_problem({column: value for column, value in row.items() if column != answer}, 5)


def test_answers():
    golds = {
        "geo3k": [r"6 \sqrt { 3 }", "48"],
        "logicvista": ["C", "AC", "3"],
        "mathverse": ["B", r"2 \sqrt{3}"],
        "wemath": ["B", "B", "B"],
        "mathvista": ["14", "0.6", "[2007, 2008]", "8/11", "same"],
        "dynamath": ["2.0944", "B", "May", "5:0", "49", "5.000000000000001"],
        "scienceqa": ["B", "A"],
        "mmmu": ["B", "8.4", "['major third', 'M3']"],
        "mmbench": ["A", "C", "B", "B"],
        "mmstar": ["B", "D"],
        "gsm8k": ["18", "1250"],
        "math500": [r"\left( 3, \frac{\pi}{2} \right)", r"\frac{3}{4}"],
    }
    assert {name: [problem.answer for problem in problems(name)] for name in BENCHMARKS} == golds


def test_images_stand_where_the_question_has_them():
    one, two = problems("geo3k")
    assert [block["type"] for block in blocks(one)] == ["image", "text"]
    assert [block["type"] for block in blocks(two)] == ["text", "image", "text", "image", "text"]
    assert blocks(two)[0]["text"] == "From "
    assert "<image>" not in text_of(two)
    choice = problems("mmmu")[0]
    assert [image.getpixel((0, 0)) for image in choice.images] == [(255, 0, 0), (0, 0, 255)]
    assert [block.get("text", "IMAGE") for block in blocks(choice)][:4] == [
        "Compare ",
        "IMAGE",
        " with the others.\nA. $6\nB. $7\nC. ",
        "IMAGE",
    ]


def test_mmmu_without_a_placeholder_starts_with_its_image():
    (problem,) = problems("mmmu", [ROWS["mmmu"][1] | {"question": "How long is the beam?"}])
    assert [block["type"] for block in blocks(problem)] == ["image", "text"]


def test_options_are_listed_with_letters():
    problem = problems("scienceqa")[0]
    assert text_of(problem).startswith(
        "Context: Some mammals fly.\nWhich is a mammal?\nA. a trout\nB. a bat\nC. a wren\n"
    )
    assert "Context" not in text_of(problems("scienceqa")[1])
    assert text_of(problems("mmbench")[3]).startswith("What is it?\nA. yes\nB. no\n\nYou FIRST")
    assert text_of(problems("mmbench")[0]).startswith("It barks not.\nWhat is it?\nA. cat\nB. dog\nC. owl\n\n")


def test_options_that_stand_in_the_text_are_found():
    found = {name: problems(name)[i].fields["options"] for name, i in (("wemath", 0), ("mathverse", 0), ("mmstar", 0))}
    assert found == {
        "wemath": ["30°", "45°", "60°", "No correct answer"],
        "mathverse": ["30°", "45°", "60°", "90°"],
        "mmstar": ["a blue car", "a red car", "a boat", "a train"],
    }
    assert problems("dynamath")[1].fields["options"] == ["yes", "no"]
    assert problems("mmstar")[1].fields["options"] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("listed", "options"),
    [
        ("A. 30;B．45;C. 60;D. none", {"A": "30", "B": "45", "C": "60", "D": "none"}),
        ("A. 30° B. 45° ;C. 60°; D. none", {"A": "30°", "B": "45°", "C": "60°", "D": "none"}),
        ("A. 4 B. 3 C. 2 ;D. 1", {"A": "4", "B": "3", "C": "2", "D": "1"}),
        ("A. from A to ;C.; B. from B to ;C.; C. neither ;C. ;D. none",)
        + ({"A": "from A to ;C.", "B": "from B to ;C.", "C": "neither ;C.", "D": "none"},),
        ("A. AB;E.; B. AB;C.; C. none.", {"A": "AB;E.", "B": "AB;C.", "C": "none."}),
        ("A. around ;O.;B. no.; F. none", {"A": "around ;O.", "B": "no.", "F": "none"}),
        ("A. ①; ③;B. ②; ③", {"A": "①; ③", "B": "②; ③"}),
        ("A: 1\nB: 2", {"A": "1", "B": "2"}),
    ],
    ids=str,
)
def test_option_lists_of_wemath(listed, options):
    """A letter inside an option, such as a point's, is not a label."""
    (problem,) = problems("wemath", [wemath_row("1", "2steps_1", "A") | {"option": listed}])
    assert dict(zip(problem.fields["letters"], problem.fields["options"], strict=True)) == options


@pytest.mark.parametrize(
    ("question", "answer", "letters", "options"),
    [
        ("How many?\nOptions: A: nan, B: Two, C: One, D: Three", "C", "BCD", ["Two", "One", "Three"]),
        ("Hint: e.g., A, B.\nHow many?\nChoices:\n(A) 4\n(B) 8\n(C) nan\n(D) nan", "B", "AB", ["4", "8"]),
        ("Which?\nOptions: A: the note C:, B: a, b, C: c, D: d", "A", "ABCD", ["the note C:", "a, b", "c", "d"]),
    ],
)
def test_option_lists_of_mmstar(question, answer, letters, options):
    (problem,) = problems("mmstar", [mmstar_row(1, question, answer)])
    assert (problem.fields["letters"], problem.fields["options"]) == (letters, options)


@pytest.mark.parametrize(
    ("question", "letters", "options"),
    [
        ("Which group?\nA. Group 1\nB. Group 2", "AB", ["Group 1", "Group 2"]),
        ("Which set?\nA: [1, 2]\nB: [3, 7]\n", "AB", ["[1, 2]", "[3, 7]"]),
        ("Which figure? choice: (A) (B) (C) (D)", "ABCD", None),  # the options are in the image
    ],
)
def test_option_lists_of_dynamath(question, letters, options):
    (problem,) = problems("dynamath", [dynamath_row("1", question, "B", "multiple choice")])
    assert (problem.fields["letters"], problem.fields["options"]) == (letters, options)


@pytest.mark.parametrize(
    ("answer", "options", "gold"),
    [
        ("(C)", "Choices:\nA.30\nB.45\nC.60", "C"),
        ("True", "Choice:\nA. False\nB. True", "B"),
        (r"090^\circ T", "Choice:\nA. 180^\\circ T\nB. 090^\\circ T".replace(r"\\", "\\"), "B"),
        ("A\nC", "Choose 2 answers:\nChoices:\nA:$x$\nB:$y$\nC:$z$", "AC"),
        ("C", "Choices:\nA:one\nB:\nC:three", "C"),
        (r"Area $=9.4 \mathrm{~cm}^{2}$", None, r"9.4 \mathrm{~cm}^{2}"),
        ("S.A. of rectangular prism $=4371.46$", None, "4371.46"),
        (r"$=\frac{7}{4}$", None, r"\frac{7}{4}"),
        ("Slope =-4", None, "-4"),
        ("35掳", None, "35°"),
        (r"$y=\sin x$", None, r"y=\sin x"),
        ("$5=s$", None, "5=s"),
        ("When x<=3 $f(x)=-x+1$", None, "When x<=3 f(x)=-x+1"),
    ],
    ids=str,
)
def test_golds_of_mathverse(answer, options, gold):
    """Forms of the published rows that are neither a letter nor bare mathematics."""
    (problem,) = problems("mathverse", [mathverse_row(1, answer, options)])
    assert problem.answer == gold
    assert BENCHMARKS["mathverse"].score(problem, rf"\boxed{{{gold}}}").correct == 1.0


def test_the_row_of_logicvista_without_a_question():
    rows = [ROWS["logicvista"][0], ROWS["logicvista"][0] | {"question": "", "answer": "", "id": "v1_382"}]
    assert [problem.id for problem in problems("logicvista", rows)] == ["v1_0"]
    with pytest.raises(ValueError, match="`answer` in row 0 of logicvista must be labels such as `A, C`, got ''"):
        problems("logicvista", [ROWS["logicvista"][0] | {"answer": ""}])


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_tables_of_text(ending, tmp_path):
    """Whose answers are numbers, and whose images are paths, as in no table of `datasets`."""
    picture("blue").save(tmp_path / "a.png")
    row = {"images": "a.png", "problem": "<image>Find x.", "answer": 48}
    path = tmp_path / f"rows.{ending}"
    lines = [",".join(row), ",".join(map(str, row.values()))] if ending == "csv" else [json.dumps(row)]
    path.write_text("\n".join(lines))
    rows = load_rows(BENCHMARKS["geo3k"], str(path))
    problem = rows.problem(0)
    assert (problem.answer, problem.images[0].getpixel((0, 0))) == ("48", (0, 0, 255))
    path.write_text(path.read_text().replace("a.png", "lost.png"))
    with pytest.raises(ValueError, match="geo3k: row 0 .*`images` in row 0 of geo3k is neither an existing image"):
        load_rows(BENCHMARKS["geo3k"], str(path)).problem(0)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_cell_that_is_no_text_is_named(name):
    """Whatever a local file has there: one error that names the row, and no bare one."""
    benchmark, row = BENCHMARKS[name], ROWS[name][0]
    texts = [column for column, value in row.items() if isinstance(value, str)]
    for column in texts:
        for value in ({"a": 1}, ["x", "y"], 1e300):
            try:
                benchmark.to_problem(row | {column: value}, 5)
            except ValueError as error:
                assert re.search(rf"ow 5 of {name}", str(error)), (column, value, error)


def test_options_that_are_not_found_leave_all_letters():
    row = ROWS["wemath"][0] | {"option": "30 or 45 or 60"}
    fields = problems("wemath", [row])[0].fields
    assert (fields["letters"], fields["options"]) == ("ABCDEFGH", None)


def test_questions_of_other_settings_are_left_out():
    assert [problem.id for problem in problems("mathverse")] == ["5", "10"]
    assert len(problems("scienceqa")) == 2  # the third has no image


def test_groups():
    group_ids = {name: [BENCHMARKS[name].group_of(p) for p in problems(name)] for name in ("dynamath", "mmbench")}
    assert group_ids == {"dynamath": ["1", "5", "2", "21", "465", "480"], "mmbench": ["241", "241", "241", "7"]}
    rows = [wemath_row("1", "2steps_1"), wemath_row("1", "2steps_multi"), wemath_row("1", "3steps_1")]
    first, second, other = map(BENCHMARKS["wemath"].group_of, problems("wemath", rows))
    assert first == second != other


def test_disciplines_are_those_published():
    subjects = [subject for names in DISCIPLINES.values() for subject in names]
    assert (len(DISCIPLINES), len(subjects), len(set(subjects))) == (6, 30, 30)
    assert problems("mmmu")[0].fields == {
        "subject": "Accounting",
        "discipline": "Business",
        "letters": "ABCD",
        "options": ["$6", "$7", "<image 2>", "none of them"],
    }


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "gsm8k",
            {"question": "q", "answer": "18"},
            r"`answer` in row 0 of gsm8k must end with `#### number`, got '18'",
        ),
        ("wemath", wemath_row("1", "4steps_1"), r"`key` in row 0 of wemath must look like .*, got '4steps_1'"),
        ("wemath", wemath_row("1", "2steps_1", "45"), "must be a letter from A to H, got '45'"),
        ("mathvista", mathvista_row("1", "q", "x", "word"), r"`answer_type` in row 0 .*'float', 'list'\], got 'word'"),
        ("mathvista", mathvista_row("1", "q", "3", "text", choices=["1", "2"]), r"one of \['1', '2'\], got '3'"),
        ("dynamath", dynamath_row("1", "q", "1", "set"), r"`answer_type` in row 0 of dynamath .* got 'set'"),
        (
            "scienceqa",
            ROWS["scienceqa"][0] | {"answer": 3},
            r"`answer` in row 0 of scienceqa must lie in \[0, 3\), got 3",
        ),
        ("mmmu", ROWS["mmmu"][0] | {"id": "val-1"}, "`id` in row 0 of mmmu must look like .* got 'val-1'"),
        ("mmmu", ROWS["mmmu"][0] | {"options": "A or B"}, "`options` in row 0 of mmmu must be a Python list"),
        ("mmmu", ROWS["mmmu"][0] | {"options": "__import__('os').getcwd()"}, "must be a Python list as text"),
        ("mmmu", ROWS["mmmu"][0] | {"answer": "E"}, "must be one of ABCD, got 'E'"),
        ("mmmu", ROWS["mmmu"][0] | {"image_2": None}, "`image_2` in row 0 of mmmu is not a readable image: missing"),
        ("mmstar", ROWS["mmstar"][0] | {"answer": "AB"}, "must be one of ABCD, got 'AB'"),
        ("mmbench", mmbench_row(1, "C", "yes", "no"), "must be one of its options"),
        ("mmbench", mmbench_row(1, "D", "yes", "no", D="maybe"), "without a gap"),
        (
            "mmbench",
            mmbench_row(1, "A", "yes", image="241"),
            "`image` in row 0 of mmbench is neither an existing image",
        ),
        ("geo3k", ROWS["geo3k"][0] | {"images": []}, "has 1 image placeholders but 0 images"),
    ],
)
def test_bad_rows_are_named(name, row, message):
    with pytest.raises(ValueError, match=message):
        problems(name, [row])


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("form", ["image", "bytes", "mapping", "base64"])
def test_images_in_all_forms(form):
    image = picture("red", mode="P")
    data = png(image)
    value = {"image": image, "bytes": data, "mapping": {"bytes": data}, "base64": base64.b64encode(data).decode()}
    assert to_image(value[form], "x").getpixel((0, 0)) == (255, 0, 0)


def test_what_is_transparent_is_white_as_in_training():
    """Black lines on a transparent ground would be invisible on black."""
    assert to_image(Image.new("RGBA", (2, 2), (0, 0, 0, 0)), "x").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("value", [b"no image", png(picture())[:40], "no base64!", None, 3, {"path": "a.png"}])
def test_images_that_cannot_be_read_are_named(value):
    with pytest.raises(ValueError, match="`image` in row 3"):
        to_image(value, "`image` in row 3")


def test_text_only_questions_are_strings():
    assert ask(" What is 1 + 1? ", "Q: {problem}\nA:") == [{"role": "user", "content": "Q: What is 1 + 1?\nA:"}]


@pytest.mark.parametrize(
    ("name", "dataset_format", "template"),
    [
        ("geo3k", "geometry3k", "think_boxed"),
        ("gsm8k", "gsm8k", "think_boxed_below"),
        ("math500", "math12k", "think_boxed_below"),
    ],
)
def test_free_form_questions_are_put_as_in_training(name, dataset_format, template):
    trained = to_prompts(dataset(name), prompt_template=template, dataset_format=dataset_format)
    for row, problem in zip(trained, problems(name), strict=True):
        assert row["prompt"] == problem.prompt
        assert row["answer"] == problem.answer


def test_mmbench_table_becomes_parquet(tmp_path):
    source, target = tmp_path / "MMBench_DEV_EN_V11.tsv", tmp_path / "rows.parquet"
    picture_text = base64.b64encode(png(picture("blue"))).decode()
    assert len(picture_text) > 64  # shorter ones are references
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]
    lines = [
        columns,
        ["241", '"What is ""it""?"', "", "cat", "dog", "", "", "A", "animals", picture_text, "nature"],
        ["1000241", "What?", "", "dog", "cat", "", "", "B", "animals", "241", "nature"],
    ]
    source.write_text("\n".join("\t".join(line) for line in lines) + "\n", encoding="utf-8")
    convert_tsv(source, target)
    rows = load_dataset("parquet", data_files=str(target), split="train", cache_dir=str(tmp_path / "cache"))
    first, rotated = problems("mmbench", rows)
    assert [first.id, rotated.id] == ["241", "1000241"]
    assert text_of(first).startswith('What is "it"?\nA. cat\nB. dog\n\n')
    assert all(problem.images[0].getpixel((0, 0)) == (0, 0, 255) for problem in (first, rotated))
    lines[2][9] = "999"
    source.write_text("\n".join("\t".join(line) for line in lines) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="`image` in row 1 .* names the row '999', which does not exist"):
        convert_tsv(source, target)
