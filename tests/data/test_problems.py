import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl.data_utils import prepare_multimodal_messages

from sapo_trl.data import FORMATS, TEMPLATES, geometry_prompt, own_columns, to_prompts
from sapo_trl.data.question import BadRow
from sapo_trl.data.templates import template_text
from sapo_trl.embedded import make_problems
from sapo_trl.role_aware import role_spans
from sapo_trl.segmentation import StepSegmenter


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
        {"images": [picture(), picture()], "problem": "In <image> and <image>, find x", "answer": "2"}
    )
    kinds = [block.get("text", "IMAGE") for block in row["prompt"][0]["content"]]
    assert kinds == ["In ", "IMAGE", " and ", "IMAGE", ", find x"]


def test_a_text_problem():
    row = geometry_prompt({"images": [], "problem": "1 + 1?", "answer": "2"})
    assert row["prompt"] == [{"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}]
    assert geometry_prompt({"images": None, "problem": "1 + 1?", "answer": "2"})["images"] == []


def test_a_text_follows_the_question():
    row = geometry_prompt({"images": [picture()], "problem": "<image>Find x.", "answer": "2"}, "Box it.")
    assert row["prompt"][0]["content"][-1] == {"type": "text", "text": "Find x. Box it."}


@pytest.mark.parametrize(("problem", "count"), [("Find x.", 1), ("<image>Find x.", 0), ("<image><image>x", 1)])
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


@pytest.mark.parametrize("image", [{"bytes": b"", "path": None}, "http://127.0.0.1:9/a.png", b""])
def test_pictures_must_be_decoded(image):
    """A processor ends on a table's files with a bare TypeError, and would fetch an address."""
    rows = Dataset.from_list([{"images": [image], "problem": "<image>Find x.", "answer": "2"}])
    with pytest.raises(ValueError, match="must hold decoded pictures, got .*`clean_prompts` reads and checks files"):
        to_prompts(rows)


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So $x = \boxed{6\sqrt{3}}$.", r"6\sqrt{3}"),
        (r"First \boxed{1}, then $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"We get $\fbox{12}$ apples.", "12"),
        (r"The sum is $\boxed 7$ in all.", "7"),
        (r"It is \boxed {x^{2}}.", "x^{2}"),
    ],
)
def test_answers_of_math(solution, answer):
    assert FORMATS["math"].read({"problem": "x", "solution": solution}).answer == answer


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("She sells 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
        ("A million.\n#### 1,000,000", "1000000"),
        ("Lost.\n#### -3", "-3"),
        ("Item #### 4?\n#### 5.5 ", "5.5"),
    ],
)
def test_answers_of_gsm8k(solution, answer):
    assert FORMATS["gsm8k"].read({"question": "x", "answer": solution}).answer == answer


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("<think>2 + 2</think>\n\n<answer>4</answer>", "4"),
        ("<think>a</think><answer>\nB\n</answer>", "B"),
        (r"<think>a</think><answer>$6\sqrt{3}$</answer>", r"6\sqrt{3}"),
        (r"<answer>$\boxed{\frac{1}{2}}$</answer>", r"\frac{1}{2}"),
        (r"<answer>$x=1$ or $y=2$</answer>", "$x=1$ or $y=2$"),
        (r"<answer>\boxed{1} or \boxed{2}</answer>", r"\boxed{1} or \boxed{2}"),
        ("<answer>first</answer> no, <answer>second</answer>", "second"),
    ],
)
def test_answers_of_open_r1(solution, answer):
    assert FORMATS["open_r1"].read({"image": None, "problem": "x", "solution": solution}).answer == answer


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("math", {"problem": "x", "solution": "No box."}),
        ("math", {"problem": "x", "solution": r"Cut off: \boxed{1"}),
        ("gsm8k", {"question": "x", "answer": "18"}),
        ("open_r1", {"image": None, "problem": "x", "solution": "<answer>4"}),
    ],
)
def test_a_solution_without_its_mark_has_no_answer(name, row):
    with pytest.raises(BadRow, match="empty answer: no "):
        FORMATS[name].read(row)


# ----------------------------------------------------------------------------------------------------------- templates


def test_the_think_prompt_is_the_published_one():
    published = (
        "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
        "The reasoning process MUST BE enclosed within <think> </think> tags. "
        r"The final answer MUST BE put in \boxed{}."
    )
    assert TEMPLATES["think_boxed"] == "{problem} " + published


def test_templates_ask_for_what_the_code_looks_for(tokenizer):
    def tokens(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        return ids, torch.ones_like(ids, dtype=torch.bool)

    # A response in the words of the prompt.
    assert '"Step n:"' in TEMPLATES["think_steps_boxed"]
    ids, mask = tokens("<think>\nStep 1: AB=3\nStep 2: BC=4\n</think> \\boxed{7}")
    segments = StepSegmenter()(torch.zeros(ids.shape), mask, ids, tokenizer)
    assert segments.ids.max() == 2  # what comes before the first step, and two steps

    for tag in ("<perception> </perception>", "<think> </think>"):
        assert tag in TEMPLATES["perception_think_boxed"]
    ids, mask = tokens("<perception>AB=3</perception> <think>3+4=7</think> \\boxed{7}")
    perception, reasoning = role_spans(ids, mask, tokenizer)
    assert tokenizer.decode(ids[perception]) == "AB=3"
    assert tokenizer.decode(ids[reasoning]) == "3+4=7"


def test_template_texts():
    assert template_text("Box it.") == "{problem} Box it."
    assert template_text("Q: {problem}\nA:") == "Q: {problem}\nA:"
    with pytest.raises(ValueError, match="prompt_template='think_boxd'.*Did you mean `think_boxed`"):
        template_text("think_boxd")
    # Braces of LaTeX are no fields.
    row = geometry_prompt({"images": [], "problem": r"\frac{1}{2}, {problem}?", "answer": "2"}, "boxed")
    assert (
        row["prompt"][0]["content"][0]["text"] == r"\frac{1}{2}, {problem}? The final answer MUST BE put in \boxed{}."
    )


# --------------------------------------------------------------------------------------------------------- own columns


def test_own_columns():
    own = own_columns(
        ["question", "final", "figure", "id"], {"problem": "question", "answer": "final", "images": "figure"}
    )
    image = picture()
    question = own.read({"question": "Find x.", "final": 42, "figure": image, "id": 0})
    assert (question.text, question.answer, question.images) == ("<image>Find x.", "42", [image])
    assert set(own.consumed) == {"question", "figure"}  # `final` stays beside `answer`
    assert own.read({"question": "In <image>", "final": 1, "figure": image}).text == "In <image>"
    assert own_columns(["problem", "answer", "image"]).images == "image"
    assert own_columns(["problem", "answer"]).read({"problem": "x", "answer": "y"}).images is None


def test_own_columns_that_do_not_exist():
    with pytest.raises(ValueError, match=r"No column for 'answer' \('final'\).*\['answer', 'problem'\].*`columns:"):
        own_columns(["problem", "answer"], {"answer": "final"})
    with pytest.raises(ValueError, match=r"`columns` names a column for \['picture'\]"):
        own_columns(["problem", "answer"], {"picture": "image"})
