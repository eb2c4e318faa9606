"""Data sets of the published schemas from files, whole and streamed, through the settings of `sapo-trl train`."""

import json
import re
import tempfile
from pathlib import Path
from typing import get_args

import pytest
import yaml
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from trl import ModelConfig, TrlParser

from sapo_trl import SAPOConfig
from sapo_trl.cli import main
from sapo_trl.cli.train import TrainArguments, load_prompts
from sapo_trl.data import load_rows
from sapo_trl.data.formats import FORMATS, FormatName
from sapo_trl.data.question import text_cell
from sapo_trl.embedded import build_model, build_processor, make_problems
from tests.testing_utils import sapo_trainer, unmoved


TEXT = Value("string")
# Columns and types as on the hub; the rows are made up.
SCHEMAS = {
    "hiyouga/geometry3k": Features(
        {
            "images": List(ImageFeature()),
            "problem": TEXT,
            "answer": TEXT,
            "id": Value("int64"),
            "choices": List(TEXT),
            "ground_truth": TEXT,
        }
    ),
    "hiyouga/math12k": Features({"problem": TEXT, "answer": TEXT}),
    "nlile/hendrycks-MATH-benchmark": Features(
        {
            "problem": TEXT,
            "solution": TEXT,
            "answer": TEXT,
            "subject": TEXT,
            "level": Value("int64"),
            "unique_id": TEXT,
        }
    ),
    "openai/gsm8k": Features({"question": TEXT, "answer": TEXT}),
    "lmms-lab/multimodal-open-r1-8k-verified": Features(
        {
            "image": ImageFeature(),
            "problem": TEXT,
            "solution": TEXT,
            "original_question": TEXT,
            "original_answer": TEXT,
        }
    ),
}
ROWS = {
    "hiyouga/geometry3k": {
        "images": [Image.new("RGB", (40, 30), "white")],
        "problem": "<image>Find $x$.",
        "answer": r"2 \sqrt { 221 }",
        "id": 3,
        "choices": ["1", "2", r"2 \sqrt { 221 }", "4"],
        "ground_truth": "C",
    },
    "hiyouga/math12k": {"problem": "What is $1+1$?", "answer": "2"},
    "nlile/hendrycks-MATH-benchmark": {
        "problem": "What is $1+1$?",
        "solution": r"It is $\boxed{2}$.",
        "answer": "2",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "train/algebra/1.json",
    },
    "openai/gsm8k": {"question": "How many?", "answer": "500 * 2 = <<500*2=1000>>1,000\n#### 1,000"},
    "lmms-lab/multimodal-open-r1-8k-verified": {
        "image": Image.new("L", (40, 30), 255),
        "problem": "How many sides?",
        "solution": "<think>I count.</think>\n\n<answer>$4$</answer>",
        "original_question": "Sides?",
        "original_answer": "The answer is 4",
    },
}
IMAGE, ASKED = {"type": "image"}, {"type": "text", "text": "How many sides?"}
EXPECTED = {
    "hiyouga/geometry3k": (
        [IMAGE, {"type": "text", "text": "Find $x$."}],
        r"2 \sqrt { 221 }",
        {"id", "choices", "ground_truth", "images"},
    ),
    "hiyouga/math12k": ("What is $1+1$?", "2", set()),
    "nlile/hendrycks-MATH-benchmark": ("What is $1+1$?", "2", {"solution", "subject", "level", "unique_id"}),
    "openai/gsm8k": ("How many?", "1000", set()),
    "lmms-lab/multimodal-open-r1-8k-verified": (
        [IMAGE, ASKED],
        "4",
        {"images", "solution", "original_question", "original_answer"},
    ),
}


def arguments(path: Path | str, **settings) -> TrainArguments:
    return TrainArguments(dataset_name=str(path), **settings)


def pictures(folder: Path, count: int = 3) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(folder / f"{i}.png")


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def reds(rows) -> list[list[int]]:
    return [[image.getpixel((0, 0))[0] for image in row["images"]] for row in rows]


class TestPublishedSchemas:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("hub_id", SCHEMAS)
    def test_by_the_name_on_the_hub(self, hub_id, streaming, tmp_path, monkeypatch):
        # A copy under the same name: no format is given, so it is found by the name.
        monkeypatch.chdir(tmp_path)
        Path(hub_id).mkdir(parents=True)
        Dataset.from_list([ROWS[hub_id]], features=SCHEMAS[hub_id]).to_parquet(
            f"{hub_id}/train-00000-of-00001.parquet"
        )
        dataset, report = load_prompts(arguments(hub_id, streaming=streaming), "train")
        (only,) = dataset
        content, answer, others = EXPECTED[hub_id]
        assert only["prompt"] == [{"role": "user", "content": content}]
        assert only["answer"] == answer
        assert set(only) == {"prompt", "answer", *others}
        assert [(image.mode, image.size) for image in only.get("images", [])] == [("RGB", (40, 30))] * (
            "images" in others
        )
        assert (report.rows, report.kept) == (1, 1)

    def test_by_the_name_of_the_format(self, tmp_path):
        for split, answer in (("train", "#### 1"), ("test", "#### 2")):
            write_lines(tmp_path / f"{split}.jsonl", [{"question": "How many?", "answer": answer}])
        for split, answer in (("train", "1"), ("test", "2")):
            dataset, report = load_prompts(arguments(tmp_path, dataset_format="gsm8k"), split)
            assert (dataset[0]["answer"], report.name) == (answer, split)

    def test_a_clone_with_several_configurations(self, tmp_path):
        for config in ("main", "socratic"):
            (tmp_path / config).mkdir()
            rows = [{"question": f"{config}?", "answer": "#### 1"}]
            Dataset.from_list(rows, features=SCHEMAS["openai/gsm8k"]).to_parquet(tmp_path / config / "train-0.parquet")
        configs = [
            {"config_name": c, "data_files": [{"split": "train", "path": f"{c}/train-*"}]}
            for c in ("main", "socratic")
        ]
        (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
        Image.new("RGB", (9, 9)).save(tmp_path / "logo.png")  # no row
        settings = {"dataset_format": "gsm8k", "dataset_config": "socratic"}
        assert load_prompts(arguments(tmp_path, **settings), "train")[0][0]["prompt"][0]["content"] == "socratic?"


class TestFiles:
    ROWS = [{"question": f"Find {i}.", "final": i, "figure": f"pics/{i}.png"} for i in range(3)]
    COLUMNS = {"problem": "question", "answer": "final", "images": "figure"}

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("place", ["file", "folder", "csv"])
    def test_paths_of_pictures_are_relative_to_the_file(self, place, streaming, tmp_path):
        pictures(tmp_path / "data" / "pics")
        if place == "csv":
            lines = ["question,final,figure", *(",".join(map(str, row.values())) for row in self.ROWS)]
            (tmp_path / "data" / "train.csv").write_text("\n".join(lines) + "\n")
        else:
            write_lines(tmp_path / "data" / "train.jsonl", self.ROWS)
        name = tmp_path if place == "folder" else next((tmp_path / "data").glob("train.*"))
        dataset, report = load_prompts(arguments(name, columns=self.COLUMNS, streaming=streaming), "train")
        rows = list(dataset)
        assert reds(rows) == [[0], [80], [160]]
        assert [row["answer"] for row in rows] == ["0", "1", "2"]
        assert rows[0]["prompt"][0]["content"] == [IMAGE, {"type": "text", "text": "Find 0."}]
        # Reward functions may ask for the answer by either name.
        assert set(rows[0]) == {"prompt", "images", "answer", "final"}
        assert report.images == 3

    @pytest.mark.parametrize("streaming", [False, True])
    def test_whole_numbers_beside_an_empty_cell(self, streaming, tmp_path):
        """Which make floats of the whole column."""
        (tmp_path / "train.csv").write_text("problem,answer\na?,8\nb?,\nc?,-12\n")
        dataset, report = load_prompts(arguments(tmp_path / "train.csv", streaming=streaming), "train")
        assert [row["answer"] for row in dataset] == ["8", "-12"]
        assert report.bad == {"empty answer": [1]}

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("place", ["file", "tsv", "folder", "pictures"])
    def test_cells_of_a_csv_stay_what_they_are(self, place, streaming, tmp_path):
        golds = ["007", "NA", "None", "null", "nan", "1e5", "1.50", "True", "", "12345678901234567890"]
        lines = ["problem,answer,digits,flag,level", *(f"{i}?,{gold},{i},True,{i}.5" for i, gold in enumerate(golds))]
        name = (
            tmp_path if place in ("folder", "pictures") else tmp_path / f"train.{'tsv' if place == 'tsv' else 'csv'}"
        )
        file = {"folder": tmp_path / "train.csv", "pictures": tmp_path / "train" / "metadata.csv"}.get(place, name)
        if place == "pictures":
            pictures(tmp_path / "train", 1)
            lines = [lines[0] + ",file_name", *(f"{line},0.png" for line in lines[1:])]
        file.write_text("\n".join(lines).replace(",", "\t" if place == "tsv" else ","))
        dataset, report = load_prompts(arguments(name, streaming=streaming), "train")
        rows = list(dataset)
        assert [row["answer"] for row in rows] == [gold for gold in golds if gold]
        assert report.bad == {"empty answer": [8]}
        # Columns of numbers stay numbers, for reward functions.
        assert [rows[1][name] for name in ("digits", "flag", "level")] == [1, True, 1.5]
        assert ("images" in rows[0]) == (place == "pictures")

    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(
            st.one_of(
                st.sampled_from(["", "NA", "None", "null", "007", "-0", "1e3", "1.50", ".5", "inf", "True", "FALSE"]),
                st.integers().map(str),
                st.floats(width=16).map(str),
                st.text("0123456789.-+eE", max_size=6),
            ),
            min_size=1,
            max_size=6,
        )
    )
    def test_any_cells_of_a_csv(self, cells):
        """Each is the same number or the same text afterwards."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "train.csv")
            path.write_text("\n".join(["answer,other", *(f"{cell},x" for cell in cells)]))
            rows, _ = load_rows(str(path))
            read = [text_cell(row, "answer") for row in rows]
        for cell, text in zip(cells, read, strict=True):
            assert text == cell or (cell.endswith(".0") and text == cell.removesuffix(".0"))

    def test_a_csv_that_is_no_table(self, tmp_path):
        (tmp_path / "train.csv").write_text("a,b\n1,2\n1,2,3\n")
        with pytest.raises(ValueError, match=r"train.csv' is no table of cells between ','.*line 3"):
            load_rows(str(tmp_path / "train.csv"))

    def test_more_pictures_than_files_with_rows(self, tmp_path):
        """Which `load_dataset` alone takes for a folder of pictures."""
        pictures(tmp_path / "pics")
        write_lines(tmp_path / "rows.jsonl", self.ROWS)
        dataset, _ = load_prompts(arguments(tmp_path, columns=self.COLUMNS), "train")
        assert reds(dataset) == [[0], [80], [160]]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_folder_of_pictures(self, streaming, tmp_path):
        pictures(tmp_path / "train")
        rows = [{"file_name": f"{i}.png", "problem": f"Find {i}.", "answer": str(i)} for i in range(4)]
        write_lines(tmp_path / "train" / "metadata.jsonl", rows)
        dataset, report = load_prompts(arguments(tmp_path, streaming=streaming), "train")
        assert reds(dataset) == [[0], [80], [160]]
        assert report.bad == {"missing image": [3]}

    def test_a_mended_picture_is_seen(self, tmp_path):
        pictures(tmp_path / "pics")
        write_lines(tmp_path / "train.jsonl", self.ROWS)
        (tmp_path / "pics" / "1.png").write_bytes(b"broken")
        settings = arguments(tmp_path / "train.jsonl", columns=self.COLUMNS)
        assert load_prompts(settings, "train")[1].bad == {"unreadable image": [1]}
        Image.new("RGB", (40, 30), (9, 0, 0)).save(tmp_path / "pics" / "1.png")
        dataset, report = load_prompts(settings, "train")
        assert (reds(dataset), report.bad) == ([[0], [9], [160]], {})

    def test_splits_and_slices(self, tmp_path):
        write_lines(tmp_path / "train.jsonl", [{"problem": f"{i}?", "answer": str(i)} for i in range(10)])
        for split, answers in (("train[:80%]", range(8)), ("train[80%:]", (8, 9))):
            dataset, _ = load_prompts(arguments(tmp_path), split)
            assert dataset["answer"] == [str(i) for i in answers]
        with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\].*`dataset_test_split`"):
            load_prompts(arguments(tmp_path), "test")
        with pytest.raises(ValueError, match=r"slice 'train\[:2\]' cannot be streamed"):
            load_prompts(arguments(tmp_path, streaming=True), "train[:2]")

    def test_two_files_that_differ_only_in_their_endings(self, tmp_path):
        (tmp_path / "train.csv").write_text("problem,answer\n1 + 1?,2\n")
        (tmp_path / "test.csv").write_text("problem,answer\n2 + 2?,4\n")
        assert load_rows(str(tmp_path))[0]["problem"] == ["1 + 1?"]
        write_lines(tmp_path / "train.jsonl", [{"problem": "3 + 3?", "answer": "6"}])
        with pytest.raises(ValueError, match=r"has both 'train\.csv' and 'train\.jsonl' in it.*remove one"):
            load_rows(str(tmp_path))
        assert load_rows(str(tmp_path / "train.jsonl"))[0]["answer"] == ["6"]
        # A card says which file is read.
        (tmp_path / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"
        )
        assert load_rows(str(tmp_path))[0]["answer"] == ["6"]

    def test_what_is_not_there_or_of_another_kind(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
            load_rows(str(tmp_path / "nothing"))
        (tmp_path / "rows.pkl").write_bytes(b"")
        with pytest.raises(ValueError, match=r"must end with one of.*got '.pkl'"):
            load_rows(str(tmp_path / "rows.pkl"))
        (tmp_path / "empty.json").touch()
        with pytest.raises(ValueError, match="has a file without rows in it. Name a file"):
            load_rows(str(tmp_path / "empty.json"))


class TestSettings:
    def parse(self, tmp_path: Path, yaml_text: str, *more: str) -> TrainArguments:
        (tmp_path / "run.yaml").write_text(f"use_cpu: true\nbf16: false\n{yaml_text}")
        parser = TrlParser((TrainArguments, SAPOConfig, ModelConfig))
        return parser.parse_args_and_config(["--config", str(tmp_path / "run.yaml"), *more])[0]

    def test_columns_in_yaml_and_on_the_command_line(self, tmp_path):
        text = "columns: {problem: question, answer: final, images: figure}\nprompt_template: think_boxed\n"
        settings = self.parse(tmp_path, text + "min_pixels: 262144\nmax_pixels: 4194304\n")
        assert settings.columns == {"problem": "question", "answer": "final", "images": "figure"}
        assert (settings.image_limits.min_pixels, settings.image_limits.max_pixels) == (262_144, 4_194_304)
        settings = self.parse(tmp_path, text, "--columns", '{"problem": "q", "answer": "a"}')
        assert settings.columns == {"problem": "q", "answer": "a"}

    def test_an_editor_completes_every_format(self):
        assert get_args(FormatName) == tuple(FORMATS)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"prompt_template": "boxd"}, "Did you mean `boxed`"),
            (
                {"dataset_format": "geometry"},
                "must be one of .*got 'geometry'.*Did you mean `geometry3k`",
            ),
            ({"columns": "question"}, "`columns` must name columns.*got 'question'"),
            ({"columns": {"question": "q"}}, r"`columns` names a column for \['question'\]"),
            ({"columns": {"problem": "q"}, "dataset_format": "math"}, "`dataset_format` and `columns` both describe"),
            ({"min_pixels": 900, "max_pixels": 800}, "must not exceed"),
            ({"max_prompt_length": 0}, "`max_prompt_length` must be at least 1"),
            ({"record_every": 0}, "`record_every` must be at least 1"),
        ],
    )
    def test_mistakes_show_before_data_is_loaded(self, settings, message):
        with pytest.raises(ValueError, match=message):
            TrainArguments(**settings)

    def test_yaml_makes_no_objects(self, tmp_path):
        with pytest.raises(Exception, match="could not determine a constructor"):
            self.parse(tmp_path, "columns: !!python/object/apply:os.getcwd []\n")


DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_code_in_the_docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|yaml)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert {kind for kind, _ in blocks} == {"python", "yaml"}
    names: dict = {}
    for kind, text in blocks:
        if kind == "yaml":
            TrainArguments(**yaml.safe_load(text))
        else:
            exec(compile(text, str(DOCS), "exec"), names)


@pytest.mark.slow
def test_the_command_saves_its_reports(tmp_path, capsys):
    build_model().save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    for split, n in (("train", 5), ("test", 3)):
        rows = make_problems(n, split=split)
        rows = rows.map(lambda row, i: {**row, "answer": "" if i == 1 else row["answer"]}, with_indices=True)
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    code = main(
        ["train", "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")]
        + ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
        + ["--max_steps", "1", "--num_mini_batches", "1", "--per_device_train_batch_size", "2"]
        + ["--gradient_accumulation_steps", "1", "--max_completion_length", "4", "--num_generations", "1"]
        + ["--eval_strategy", "steps", "--eval_steps", "1", "--per_device_eval_batch_size", "2"]
        + ["--beta", "0", "--critic", "shared", "--max_prompt_length", "500", "--gradient_checkpointing", "false"]
    )
    assert code == 0
    reports = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert {name: (report["rows"], report["bad"]) for name, report in reports.items()} == {
        "train": (5, {"empty answer": [1]}),
        "test": (3, {"empty answer": [1]}),
    }
    printed = capsys.readouterr().out
    assert "train: 4 of 5 rows" in printed
    assert "step 1, evaluation: reward" in printed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("streaming", [False, True])
def test_one_step_of_training(family, streaming, tmp_path):
    schema = SCHEMAS["hiyouga/geometry3k"]
    rows = [{**ROWS["hiyouga/geometry3k"], "problem": f"<image>Find {side}."} for side in ("AB", "BC", "CD", "DA")]
    rows += [{**rows[0], "answer": ""}]
    Dataset.from_list(rows, features=schema).to_parquet(tmp_path / "train.parquet")
    settings = arguments(tmp_path, streaming=streaming, prompt_template="boxed", min_pixels=3136, max_pixels=4096)
    dataset, report = load_prompts(settings, "train", processor=family.processing_class)
    trainer = sapo_trainer(family, tmp_path / "out", trainer_kwargs={"train_dataset": dataset}, max_steps=1)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert len(unmoved(before, trainer.model)) < len(before)
    assert report.bad == {"empty answer": [4]}
    assert (report.resized, report.largest_after) == (4, (65, 49))
