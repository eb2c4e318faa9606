import pytest
from datasets import Dataset
from PIL import Image
from trl.data_utils import prepare_multimodal_messages

from sapo_trl.data import geometry_prompt, to_prompts
from sapo_trl.embedded import make_problems


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


def test_one_row():
    image = picture()
    row = geometry_prompt({"images": [image], "problem": "<image>Find x.", "answer": "48", "id": 3})
    assert row == {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find x."}]}],
        "images": [image],
        "answer": "48",
    }


def test_images_stay_where_the_text_has_them():
    row = geometry_prompt(
        {"images": [picture(), picture()], "problem": "In <image> and <image>, find x", "answer": ""}
    )
    kinds = [block.get("text", "IMAGE") for block in row["prompt"][0]["content"]]
    assert kinds == ["In ", "IMAGE", " and ", "IMAGE", ", find x"]


def test_a_text_problem():
    row = geometry_prompt({"images": [], "problem": "1 + 1?", "answer": "2"})
    assert row["prompt"] == [{"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}]
    assert geometry_prompt({"images": None, "problem": "1 + 1?", "answer": "2"})["images"] == []


def test_instruction_follows_the_question():
    row = geometry_prompt({"images": [picture()], "problem": "<image>Find x.", "answer": "2"}, instruction="Box it.")
    assert row["prompt"][0]["content"][-1] == {"type": "text", "text": "Find x. Box it."}


@pytest.mark.parametrize(("problem", "count"), [("Find x.", 1), ("<image>Find x.", 0), ("<image><image>", 1)])
def test_placeholders_must_match_images(problem, count):
    with pytest.raises(ValueError, match=r"placeholders but \d images"):
        geometry_prompt({"images": [picture()] * count, "problem": problem, "answer": "2"})


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match=r"Missing columns \['images', 'answer'\].*found \['problem', 'solution'\]"):
        geometry_prompt({"problem": "x", "solution": "y"})
    with pytest.raises(ValueError, match=r"Missing columns \['answer'\]"):
        to_prompts(Dataset.from_dict({"images": [[]], "problem": ["x"]}))
    with pytest.raises(ValueError, match=r"Missing columns \['answer'\]"):
        next(iter(to_prompts(Dataset.from_dict({"images": [[]], "problem": ["x"]}).to_iterable_dataset())))


@pytest.mark.parametrize("iterable", [False, True])
def test_whole_data_set_is_what_trl_takes(iterable):
    problems = make_problems(5)
    dataset = to_prompts(problems.to_iterable_dataset() if iterable else problems)
    for row, problem in zip(dataset, problems, strict=True):
        assert set(row) == {"prompt", "images", "answer"}
        assert row["answer"] == problem["answer"]
        assert row["images"][0].tobytes() == problem["images"][0].tobytes()
        content = prepare_multimodal_messages(row["prompt"], row["images"])[0]["content"]
        assert content[0]["image"] is row["images"][0]
        assert f"<image>{content[1]['text']}" == problem["problem"]
