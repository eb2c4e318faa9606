import math
import random
import re

import pytest
import torch
from datasets import Image, List
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from sapo_trl.embedded import (
    Problem,
    WarmStartConfig,
    all_problems,
    build_model,
    build_processor,
    build_tokenizer,
    evaluate,
    load_processor,
    make_problems,
    reference_solution,
    sample_problems,
    warm_start,
)
from sapo_trl.embedded.evaluation import encode_prompts
from sapo_trl.embedded.imitation import fingerprint
from sapo_trl.embedded.warm_start import encode_solutions, validation_accuracy
from sapo_trl.statistics import wilson_interval


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model(processor):
    return build_model(processor.tokenizer).eval()


# ------------------------------------------------------------------------------------------------------------ problems


def test_answers_are_the_value_of_the_question():
    for problem in sample_problems(500, seed=1):
        expression = re.fullmatch(r"Find (.*)\.", problem.question).group(1)
        value = eval(expression, dict(zip(("AB", "BC", "CD", "DA"), problem.lengths, strict=True)))
        assert problem.answer == str(value)
        assert value >= 0


def test_splits_share_no_picture_and_no_problem():
    train, test = all_problems("train"), all_problems("test")
    assert not {p.lengths for p in train} & {p.lengths for p in test}
    assert not set(train) & set(test)
    assert len(set(train)) == len(train) == 23_916
    assert len(set(test)) == len(test) == 6_120


def test_splits_are_alike():
    # The digits and the operators of one are as frequent as those of the other: the test set is not harder.
    train, test = all_problems("train"), all_problems("test")
    for side in range(4):
        means = [sum(p.lengths[side] for p in split) / len(split) for split in (train, test)]
        assert means[0] == pytest.approx(means[1], abs=0.3)
    for sign in range(3):
        shares = [sum(p.signs[sign] > 0 for p in split) / len(split) for split in (train, test)]
        assert shares[0] == pytest.approx(shares[1], abs=0.03)


def test_data_set_has_the_columns_of_geometry3k():
    dataset = make_problems(20, split="test", seed=3)
    assert dataset.column_names == ["images", "problem", "answer"]
    assert dataset.features["images"] == List(Image())
    for row, problem in zip(dataset, sample_problems(20, split="test", seed=3), strict=True):
        assert [image.size for image in row["images"]] == [(56, 56)]
        assert row["problem"] == f"<image>{problem.question}"
        assert row["answer"] == problem.answer


def test_data_set_depends_on_the_seed_only():
    def contents(dataset):
        return [(row["images"][0].tobytes(), row["problem"], row["answer"]) for row in dataset]

    assert contents(make_problems(10, seed=1)) == contents(make_problems(10, seed=1))
    assert contents(make_problems(10, seed=1)) != contents(make_problems(10, seed=2))


def test_each_label_lies_in_its_own_visual_token():
    # Changing one length changes the picture in one quadrant only: AB top right, then clockwise.
    def pixels(lengths):
        from sapo_trl.embedded.drawing import draw_quadrilateral

        image = draw_quadrilateral(lengths, random.Random(0)).convert("L")
        return torch.tensor(list(image.tobytes())).reshape(56, 56)

    base = pixels((1, 1, 1, 1))
    quadrants = [(slice(28), slice(28, 56)), (slice(28, 56), slice(28, 56)), (slice(28, 56), slice(28))]
    quadrants.append((slice(28), slice(28)))
    for side, quadrant in enumerate(quadrants):
        changed = pixels(tuple(8 if i == side else 1 for i in range(4))) != base
        assert changed[quadrant].sum() == changed.sum() > 0


@pytest.mark.parametrize("n", [-1, 6_121])
def test_impossible_sizes(n):
    with pytest.raises(ValueError, match=rf"n={n} .* the test split has 6120"):
        make_problems(n, split="test")


def test_unknown_split():
    with pytest.raises(ValueError, match="split='validation'"):
        make_problems(1, split="validation")


# ----------------------------------------------------------------------------------------------------------- solutions


def test_reference_solution():
    problem = Problem(lengths=(7, 3, 5, 9), signs=(-1, 1, -1))
    assert reference_solution(problem) == "AB=7\nBC=3\nCD=5\nDA=9\n7-3=4\n4+5=9\n9-9=0\n\\boxed{0}"


def test_wrong_sums_are_as_frequent_as_asked_and_carried_on():
    rng = random.Random(0)
    wrong = total = 0
    for problem in sample_problems(1000):
        lines = reference_solution(problem, error_rate=0.3, rng=rng).split("\n")
        assert lines[:4] == reference_solution(problem).split("\n")[:4]
        running = problem.lengths[0]
        for line, sign, length in zip(lines[4:7], problem.signs, problem.lengths[1:], strict=True):
            left, result = line.rsplit("=", 1)
            assert left == f"{running}{'+' if sign > 0 else '-'}{length}"
            error = int(result) - (running + sign * length)
            assert abs(error) <= 2
            wrong, total = wrong + (error != 0), total + 1
            running = int(result)
        assert lines[7] == f"\\boxed{{{running}}}"
    assert wrong / total == pytest.approx(0.3, abs=3 * math.sqrt(0.3 * 0.7 / total))


def test_errors_need_a_source_of_randomness():
    with pytest.raises(ValueError, match="error_rate=0.3"):
        reference_solution(sample_problems(1)[0], error_rate=0.3)


# ---------------------------------------------------------------------------------------------- tokenizer, processor


def test_tokenizer_round_trips_any_text():
    tokenizer = build_tokenizer()
    for text in ("Find AB-BC+CD-DA.", "AB=7\n12-3=9\n\\boxed{9}", "Größe: 3,14 €\n\n中文 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_has_one_token_a_digit_and_qwens_special_tokens():
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("12-13=25") == ["1", "2", "-", "1", "3", "=", "2", "5"]
    for token in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|video_pad|>"):
        assert tokenizer.tokenize(f"a{token}b") == ["a", token, "b"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) < 400


def test_tokenizer_is_the_same_every_time_and_after_saving(tmp_path):
    tokenizer = build_tokenizer()
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nFind AB+BC.<|im_end|>\n\\boxed{12}"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template


def test_prompts_are_qwens(processor):
    inputs = encode_prompts(processor, make_problems(1))
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert re.fullmatch(
        r"<\|im_start\|>system\nYou are a helpful assistant.<\|im_end\|>\n<\|im_start\|>user\n<\|vision_start\|>"
        r"(<\|image_pad\|>){4}<\|vision_end\|>Find AB[+-]BC[+-]CD[+-]DA\.<\|im_end\|>\n<\|im_start\|>assistant\n",
        text,
    )
    assert inputs["mm_token_type_ids"].tolist() == (inputs["input_ids"] == processor.image_token_id).long().tolist()
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_processor_uses_the_real_image_processor(processor):
    assert type(processor.image_processor) is Qwen2VLImageProcessorPil
    # White becomes 0; each patch holds its pixels twice, because a still counts as two frames.
    row = make_problems(1)[0]
    pixels = encode_prompts(processor, [row])["pixel_values"].reshape(16, 3, 2, 14, 14)
    image = torch.tensor(list(row["images"][0].convert("L").tobytes()), dtype=torch.float32).reshape(56, 56)
    torch.testing.assert_close(pixels[0, 0, 0], (image[:14, :14] / 255 - 1.0) / 0.3)
    torch.testing.assert_close(pixels[:, :, 0], pixels[:, :, 1])


def test_processor_survives_saving(processor, model, tmp_path):
    processor.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    expected = encode_prompts(processor, make_problems(3))
    for loaded in (AutoProcessor.from_pretrained(tmp_path), load_processor(tmp_path)):
        assert type(loaded) is type(processor)
        assert loaded.tokenizer.padding_side == "left"
        actual = encode_prompts(loaded, make_problems(3))
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.skipif(is_torchvision_available(), reason="about machines without torchvision")
def test_stock_checkpoints_load_without_torchvision(processor, model, tmp_path):
    # As Qwen publishes them: the stock class's name, and a `preprocessor_config.json`.
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    config = tmp_path / "preprocessor_config.json"
    assert config.exists()
    text = config.read_text().replace("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor")
    config.write_text(text.replace("{", '{"processor_class": "Qwen2_5_VLProcessor",', 1))
    with pytest.raises(ImportError, match="[Tt]orchvision"):
        AutoProcessor.from_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    expected = encode_prompts(processor, make_problems(2))
    torch.testing.assert_close(encode_prompts(loaded, make_problems(2))["pixel_values"], expected["pixel_values"])


def test_load_processor_of_a_text_model(tmp_path):
    from transformers import Qwen2Config

    build_tokenizer().save_pretrained(tmp_path)
    Qwen2Config().save_pretrained(tmp_path)
    tokenizer = load_processor(tmp_path)
    assert tokenizer("AB")["input_ids"] == build_tokenizer()("AB")["input_ids"]
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "left")


# --------------------------------------------------------------------------------------------------------------- model


def test_model_has_about_a_million_parameters(model):
    assert 0.8e6 < model.num_parameters() < 1.1e6


def test_model_depends_on_the_seed_only(model):
    same, other = build_model(seed=0), build_model(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


@torch.no_grad()
def test_model_sees_the_picture(model, processor):
    rows = [make_problems(1)[0], make_problems(1, seed=5)[0]]
    rows[1]["problem"] = rows[0]["problem"]
    assert rows[0]["images"][0].tobytes() != rows[1]["images"][0].tobytes()
    logits = model(**encode_prompts(processor, rows)).logits[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def test_generation_scores_tokens_as_training_does(model, processor):
    # Training scores prompt and response in one forward, which is the same only if it is told where the images are:
    # Qwen2.5-VL lays out positions by `mm_token_type_ids`.
    inputs = encode_prompts(processor, make_problems(4))
    output = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    prompt_length = inputs["input_ids"].shape[1]
    ones = torch.ones_like(output.sequences[:, prompt_length:])
    whole = {
        **inputs,
        "input_ids": output.sequences,
        "attention_mask": torch.cat([inputs["attention_mask"], ones], 1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], 0 * ones], 1),
    }
    generated = torch.stack(output.logits, 1)
    torch.testing.assert_close(model(**whole).logits[:, prompt_length - 1 : -1], generated, atol=1e-4, rtol=0)
    del whole["mm_token_type_ids"]
    assert (model(**whole).logits[:, prompt_length - 1 : -1] - generated).abs().max() > 0.01


def test_wilson_interval():
    # Published values: Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    for successes, trials in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match=f"successes={successes} of trials={trials}"):
            wilson_interval(successes, trials)


def test_evaluation_is_reproducible_and_leaves_no_trace(model, processor):
    problems = make_problems(6, split="test")
    model.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    done = []
    first = evaluate(model, processor, problems, batch_size=4, max_new_tokens=8, on_progress=done.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert done == [4, 6]
    again = evaluate(model, processor, problems, batch_size=4, max_new_tokens=8)
    other = evaluate(model, processor, problems, batch_size=4, max_new_tokens=8, seed=1)
    assert first.completions == again.completions != other.completions
    model.eval()


def test_greedy_evaluation_does_not_depend_on_the_batch(model, processor):
    problems = make_problems(5, split="test")
    batched = evaluate(model, processor, problems, temperature=0.0, max_new_tokens=8)
    alone = evaluate(model, processor, problems, temperature=0.0, max_new_tokens=8, batch_size=1)
    assert batched == alone
    assert batched.accuracy == 0.0  # of random weights


def test_temperature_must_not_be_negative(model, processor):
    with pytest.raises(ValueError, match="temperature=-1"):
        evaluate(model, processor, make_problems(1), temperature=-1)


# ---------------------------------------------------------------------------------------------------------- warm start


def test_solutions_are_laid_out_like_rollouts(processor):
    problems = [Problem((1, 1, 1, 1), (1, 1, 1)), Problem((9, 9, 9, 9), (1, 1, 1))]
    batch = encode_solutions(processor, problems, rng=random.Random(0))
    tokenizer = processor.tokenizer
    for problem, ids, mask, types, labels in zip(
        problems,
        batch["input_ids"],
        batch["attention_mask"],
        batch["mm_token_type_ids"],
        batch["labels"],
        strict=True,
    ):
        response = labels[labels != -100]
        assert tokenizer.decode(response) == reference_solution(problem) + "<|im_end|>"
        assert torch.equal(ids[labels != -100], response)
        text = tokenizer.decode(ids[mask == 1])
        assert text.endswith(f"{problem.question}<|im_end|>\n<|im_start|>assistant\n{tokenizer.decode(response)}")
        assert torch.equal(types == 1, ids == processor.image_token_id)


def test_validation_accuracy_is_greedy_accuracy(processor):
    # A model that is made to predict the labels by force: the shares are those of the labels it is given.
    problems = sample_problems(4)
    batch = encode_solutions(processor, problems, rng=random.Random(0))

    class Oracle(torch.nn.Module):
        def __init__(self, predicted):
            super().__init__()
            self.predicted = predicted

        def forward(self, **inputs):
            class Output:
                logits = torch.nn.functional.one_hot(self.predicted.clamp(min=0).roll(-1, 1), 400).float()

            return Output

    assert validation_accuracy(Oracle(batch["labels"]), batch) == (1.0, 1.0)
    wrong = batch["labels"].clone()
    first = int((wrong[0] != -100).nonzero()[0])
    wrong[0, first + 2] += 1  # one length of sixteen, in one solution of four
    wrong[1, first + 17] += 1  # something in a sum
    assert validation_accuracy(Oracle(wrong), batch) == (15 / 16, 2 / 4)


def test_warm_start_saves_once_and_is_found_again(tmp_path):
    config = WarmStartConfig(
        problems=8, batch_size=4, cooldown_steps=2, target_reading_accuracy=0.0, target_solved=0.0
    )
    steps = []
    folder = warm_start(tmp_path, config, on_progress=steps.append)
    assert [news.step for news in steps] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert len(evaluate(model, processor, make_problems(2), max_new_tokens=2).completions) == 2
    untrained = build_model(seed=config.seed).lm_head.weight
    assert not torch.equal(model.lm_head.weight, untrained)

    assert warm_start(tmp_path, config, on_progress=steps.append) == folder
    assert len(steps) == 2
    other = warm_start(tmp_path, WarmStartConfig(**{**vars(config), "seed": 1}), on_progress=steps.append)
    assert other != folder
    assert len(steps) == 4


def test_warm_start_that_does_not_learn_fails(tmp_path):
    config = WarmStartConfig(problems=8, batch_size=2, max_steps=0)
    with pytest.raises(RuntimeError, match="seed=0 reads .* Use another `seed`, or raise `max_steps`"):
        warm_start(tmp_path, config)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- fingerprint


CODE = """
import math

def area(radius):
    return math.pi * radius**2
"""
SAME_CODE = [
    '"""A module."""\n' + CODE,
    CODE.replace("import math\n", "from math import tau\nimport math\n"),
    CODE.replace("(radius):\n", '(radius):\n    """The area of a circle."""\n'),
    CODE.replace("    return", "    # of a circle\n\n    return"),
]
OTHER_CODE = [
    CODE.replace("**2", "**3"),
    CODE.replace("(radius)", "(radius=1)"),
    CODE.replace("(radius)", "(r)").replace("* radius", "* r"),
    CODE + "\nUNIT = 'cm'\n",
]


def fingerprint_of(folder, code):
    folder.mkdir(exist_ok=True)
    (folder / "module.py").write_text(code)
    return fingerprint(WarmStartConfig(), [folder])


@pytest.mark.parametrize("code", SAME_CODE)
def test_words_leave_the_fingerprint_as_it_is(tmp_path, code):
    assert fingerprint_of(tmp_path / "a", code) == fingerprint_of(tmp_path / "b", CODE)


@pytest.mark.parametrize("code", OTHER_CODE)
def test_code_changes_the_fingerprint(tmp_path, code):
    assert fingerprint_of(tmp_path / "a", code) != fingerprint_of(tmp_path / "b", CODE)
