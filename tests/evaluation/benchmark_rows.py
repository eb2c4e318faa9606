"""A few rows of each benchmark, with the columns and types that its data set was published with."""

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage


TEXT, INT64, PICTURE = Value("string"), Value("int64"), Image()


def picture(color: str = "white", mode: str = "RGB") -> PILImage.Image:
    return PILImage.new("RGB", (32, 32), color).convert(mode)


def texts(*names: str) -> dict[str, Value]:
    return dict.fromkeys(names, TEXT)


FEATURES = {
    "geo3k": {"images": List(PICTURE), **texts("problem", "answer"), "id": INT64}
    | {"choices": List(TEXT), "ground_truth": TEXT},
    "logicvista": {"image": PICTURE, **texts("question", "answer", "reasoning", "imagesource", "sourcelink", "id")}
    | {"skill": List(TEXT), "broad_capability": List(TEXT), "specific_capability": List(TEXT)},
    "mathverse": {
        **texts("sample_index", "problem_index", "problem_version", "question"),
        "image": PICTURE,
        **texts("answer", "question_type"),
        "metadata": texts("split", "source", "subject", "subfield"),
        **texts("query_wo", "query_cot", "question_for_eval"),
    },
    "wemath": texts("ID", "split", "knowledge concept", "question", "option", "answer")
    | {"image_path": PICTURE, "key": TEXT, "question number": INT64, "knowledge concept description": TEXT},
    "mathvista": {
        **texts("pid", "question", "image"),
        "decoded_image": PICTURE,
        "choices": List(TEXT),
        "unit": TEXT,
        "precision": Value("float64"),
        **texts("answer", "question_type", "answer_type"),
        "metadata": texts("category", "context", "grade", "language", "source", "split", "task")
        | {"img_height": INT64, "img_width": INT64, "skills": List(TEXT)},
        "query": TEXT,
    },
    "dynamath": texts("id", "question", "image")
    | {"decoded_image": PICTURE}
    | texts("ground_truth", "answer_type", "subject", "knowledge_level"),
    "scienceqa": {"image": PICTURE, "question": TEXT, "choices": List(TEXT), "answer": Value("int8")}
    | texts("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"),
    "mmmu": texts("id", "question", "options", "explanation")
    | {f"image_{number}": PICTURE for number in range(1, 8)}
    | texts("img_type", "answer", "topic_difficulty", "question_type", "subfield"),
    "mmbench": {"index": TEXT, **texts("question", "hint", "answer", "A", "B", "C", "D", "category")}
    | {"image": PICTURE}
    | texts("source", "L2-category", "comment", "split"),
    "mmstar": {"index": INT64, "question": TEXT, "image": PICTURE, **texts("answer", "category", "l2_category")}
    | {"meta_info": texts("source", "split", "image_path")},
    "gsm8k": texts("question", "answer"),
    "math500": texts("problem", "solution", "answer", "subject") | {"level": INT64, "unique_id": TEXT},
}


def mathvista_row(pid: str, question: str, answer: str, answer_type: str, **values) -> dict:
    is_choice = answer_type == "text"
    choices = values.get("choices")
    listed = "".join(f"\n({letter}) {choice}" for letter, choice in zip("ABCDEFGH", choices or (), strict=False))
    return {
        "pid": pid,
        "question": question,
        "decoded_image": picture(),
        "choices": None,
        "precision": None,
        "answer": answer,
        "answer_type": answer_type,
        "question_type": "multi_choice" if is_choice else "free_form",
        "metadata": {"task": "figure question answering", "skills": ["statistical reasoning"]},
        "query": f"Hint: Please answer the question.\nQuestion: {question}"
        + (f"\nChoices:{listed}" if listed else ""),
        **values,
    }


def wemath_row(problem: str, key: str, answer: str = "B") -> dict:
    return {
        "ID": problem,
        "split": "testmini",
        "question": "How large is the angle?",
        "option": "A. 30°; B. 45°; C. 60°; D. No correct answer",
        "answer": answer,
        "image_path": picture(),
        "key": key,
        "question number": 1,
    }


def mathverse_row(index: int, answer: str, options: str | None = None, **values) -> dict:
    return {
        "sample_index": str(index),
        "problem_index": "1",
        "problem_version": "Vision Only",
        "question": "",
        "image": picture(),
        "answer": answer,
        "question_type": "free-form" if options is None else "multi-choice",
        "metadata": {"subject": "Plane Geometry", "subfield": "Angle"},
        "question_for_eval": f"Find the angle.\n{options or ''}",
        **values,
    }


def mmstar_row(index: int, question: str, answer: str) -> dict:
    return {
        "index": index,
        "question": question,
        "image": picture(),
        "answer": answer,
        "category": "math",
        "l2_category": "geometry",
    }


def dynamath_row(seed: str, question: str, answer: str, kind: str) -> dict:
    return {
        "id": seed,
        "question": question,
        "image": f"images/image_{seed}.png",
        "decoded_image": picture(),
        "ground_truth": answer,
        "answer_type": kind,
        "subject": "algebra",
        "knowledge_level": "high school",
    }


def mmbench_row(index: int, answer: str, *options: str, **values) -> dict:
    return {
        "index": str(index),
        "question": "What is it?",
        "hint": None,
        "answer": answer,
        **(dict.fromkeys("ABCD", "nan") | dict(zip("ABCD", options, strict=False))),
        "category": "object localization",
        "image": picture(),
        **values,
    }


def science_row(**values) -> dict:
    return {
        "image": picture(mode="P"),
        "question": "Which is a mammal?",
        "choices": ["a trout", "a bat", "a wren"],
        "answer": 1,
        "hint": "Some mammals fly.",
        "subject": "natural science",
        **values,
    }


ROWS = {
    "geo3k": [
        {"images": [picture()], "problem": "<image>Find x.", "answer": r"6 \sqrt { 3 }", "id": 7},
        {"images": [picture(), picture()], "problem": "From <image> and <image> find y.", "answer": "48", "id": 8},
    ],
    "logicvista": [
        {
            "image": picture(),
            "question": "Which comes next (A-E)?",
            "answer": "C",
            "id": "v1_0",
            "skill": ["inductive"],
        },
        {"image": picture(), "question": "Which are green (A-D)?", "answer": "A, C", "id": "v1_1"},
        {"image": picture(), "question": "Which is right? Select from 1-5", "answer": "3", "id": "v1_20"},
    ],
    "mathverse": [
        {
            "sample_index": "5",
            "problem_index": "1",
            "problem_version": "Vision Only",
            "question": "",
            "image": picture(),
            "answer": "B",
            "question_type": "multi-choice",
            "metadata": {"subject": "Plane Geometry", "subfield": "Angle"},
            "question_for_eval": "Find the angle.\nChoices:\nA:30°\nB:45°\nC:60°\nD:90°",
        },
        {
            "sample_index": "10",
            "problem_index": "2",
            "problem_version": "Vision Only",
            "question": "",
            "image": picture(),
            "answer": r"2 \sqrt{3}",
            "question_type": "free-form",
            "metadata": {"subject": "Plane Geometry", "subfield": "Length"},
            "question_for_eval": "Find the length.",
        },
        {
            "sample_index": "6",
            "problem_index": "2",
            "problem_version": "Text Dominant",
            "question": "Find the length of AB.",
            "image": picture(),
            "answer": "5",
            "question_type": "free-form",
            "metadata": {},
        },
    ],
    "wemath": [wemath_row("1", key) for key in ("2steps_1", "2steps_2", "2steps_multi")],
    "mathvista": [
        mathvista_row("1", "How many?", "14", "integer"),
        mathvista_row("2", "Which fraction?", "0.6", "float", precision=1.0),
        mathvista_row("3", "Between which years?", "[2007, 2008]", "list"),
        mathvista_row("4", "What fraction is blue?", "8/11", "text", choices=["3/11", "8/11", "6/11", "3/5"]),
        mathvista_row("5", "Are they the same?", "same", "text", choices=["other", "same", "same"]),
    ],
    "dynamath": [
        dynamath_row("1", "What is the period?", "2.0944", "float"),
        dynamath_row("5", "Is Dark Magenta greater? Choices: (A) yes (B) no", "B", "multiple choice"),
        dynamath_row("2", "Which month is the hottest?", "May", "text"),
        dynamath_row("21", "What time is shown? Answer in the form __:__.", "5:0", "text"),
        dynamath_row("465", "How many more?", "49", "single answer"),
        dynamath_row("480", "What is the trace?", "5.000000000000001", "int"),
    ],
    "scienceqa": [science_row(), science_row(hint="", answer=0), science_row(image=None)],
    "mmmu": [
        {
            "id": "validation_Accounting_1",
            "question": "Compare <image 1> with the others.",
            "options": "['$6', '$7', '<image 2>', 'none of them']",
            "image_1": picture("red"),
            "image_2": picture("blue"),
            "answer": "B",
            "question_type": "multiple-choice",
        },
        {
            "id": "validation_Architecture_and_Engineering_12",
            "question": "How long is the beam in <image 1>?",
            "options": "[]",
            "image_1": picture(),
            "answer": "8.4",
            "question_type": "open",
        },
        {
            "id": "validation_Music_3",
            "question": "Name the interval <image 1>.",
            "options": "[]",
            "image_1": picture(),
            "answer": "['major third', 'M3']",
            "question_type": "open",
        },
    ],
    "mmbench": [
        mmbench_row(241, "A", "cat", "dog", "owl", hint="It barks not."),
        mmbench_row(1_000_241, "C", "dog", "owl", "cat"),
        mmbench_row(2_000_241, "B", "owl", "cat", "dog"),
        mmbench_row(7, "B", "yes", "no"),
    ],
    "mmstar": [
        {
            "index": 0,
            "question": "<image 1> Which is it?\nOptions: A: a blue car, B: a red car, C: a boat, D: a train",
            "image": picture(),
            "answer": "B",
            "category": "coarse perception",
            "l2_category": "image scene and topic",
        },
        {
            "index": 1,
            "question": "How many are there?\nOptions: A: 1, B: 2, C: 3, D: 4",
            "image": picture(),
            "answer": "D",
            "category": "math",
            "l2_category": "numeric commonsense and calculation",
        },
    ],
    "gsm8k": [
        {"question": "How much is left?", "answer": "She has 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 18"},
        {"question": "How many in all?", "answer": "All together.\n#### 1,250"},
    ],
    "math500": [
        {
            "problem": "Convert the point to polar coordinates.",
            "solution": r"... \boxed{\left( 3, \frac{\pi}{2} \right)}",
            "answer": r"\left( 3, \frac{\pi}{2} \right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        {
            "problem": "Compute the sum.",
            "answer": r"\frac{3}{4}",
            "subject": "Algebra",
            "level": 5,
            "unique_id": "test/algebra/2584.json",
        },
    ],
}


def dataset(name: str) -> Dataset:
    """The rows as a data set of the published types; columns that a row leaves out are empty."""
    features = Features(FEATURES[name])
    return Dataset.from_list([dict.fromkeys(features) | row for row in ROWS[name]], features=features)
