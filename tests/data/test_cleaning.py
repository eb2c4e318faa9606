"""Pictures and rows that cannot be trained on, and the counts of them."""

import io
import json
import math
import struct
import zlib
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from rich.console import Console

from sapo_trl.data import FORMATS, CleaningReport, ImageLimits, clean_prompts, load_rows, own_columns, save_reports
from sapo_trl.data.cleaning import count_tokens
from sapo_trl.data.images import fit_image
from sapo_trl.data.placeholders import placeholders
from sapo_trl.data.question import BadRow, text_cell


FEATURES = Features({"images": List(ImageFeature()), "problem": Value("string"), "answer": Value("string")})
GEOMETRY3K = FORMATS["geometry3k"]


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(size: tuple[int, int] = (32, 24), colour: str | tuple = "red") -> bytes:
    return encoded(Image.new("RGB", size, colour))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def row(problem: str | None = "<image>Find x.", answer: str | None = "2", *images) -> dict:
    return {
        "images": [{"bytes": image, "path": None} for image in images or (png(),)],
        "problem": problem,
        "answer": answer,
    }


def clean(rows: list[dict], streaming: bool = False, **options) -> tuple[list[dict], CleaningReport]:
    dataset = Dataset.from_list(rows, features=FEATURES)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    dataset, report = clean_prompts(dataset, GEOMETRY3K, **options)
    return list(dataset), report


# -------------------------------------------------------------------------------------------------------------- images


class TestImages:
    def test_a_sound_picture_stays_the_file_it_is(self):
        for data in (png(), encoded(Image.new("RGB", (32, 24)), "JPEG")):
            fitted = fit_image({"bytes": data, "path": None})
            assert fitted.data == fitted.source == data
            assert fitted.before == fitted.after == (32, 24)

    def test_pictures_in_memory(self):
        for mode, colour in (("RGB", "red"), ("CMYK", (0, 255, 255, 0)), ("RGBA", (255, 0, 0, 255))):
            fitted = fit_image(Image.new(mode, (4, 2), colour), ImageLimits(min_pixels=32))
            assert (decoded(fitted.data).size, decoded(fitted.data).getpixel((0, 0))) == ((8, 4), (255, 0, 0))

    def test_every_mode_becomes_rgb(self):
        grey = np.array([[0, 32768, 65535]], dtype=np.uint16)
        assert np.array(decoded(fit_image(encoded(Image.fromarray(grey))).data))[0, :, 0].tolist() == [0, 128, 255]
        pure = {"1": 1, "L": 255, "P": 0, "CMYK": (0, 0, 0, 0), "LA": (255, 255)}
        for mode, white in pure.items():
            image = Image.new(mode, (4, 4), white)
            if mode == "P":
                image.putpalette([255, 255, 255])
            data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
            fitted = decoded(fit_image(data).data)
            assert (fitted.mode, fitted.getpixel((0, 0))) == ("RGB", (255, 255, 255)), mode

    def test_what_is_transparent_becomes_white(self):
        ink = Image.new("RGBA", (3, 1), (0, 0, 0, 0))  # black, but invisible
        ink.putpixel((1, 0), (0, 0, 0, 255))
        ink.putpixel((2, 0), (255, 0, 0, 128))
        pixels = np.array(decoded(fit_image(encoded(ink)).data))[0]
        assert pixels[:2].tolist() == [[255, 255, 255], [0, 0, 0]]
        assert np.abs(pixels[2].astype(int) - [255, 127, 127]).max() <= 1

        keyed = Image.new("RGB", (2, 1), "black")  # a transparent colour of an RGB file
        keyed.putpixel((1, 0), (255, 0, 0))
        pixels = np.array(decoded(fit_image(encoded(keyed, transparency=(0, 0, 0))).data))[0]
        assert pixels.tolist() == [[255, 255, 255], [255, 0, 0]]

    def test_a_photograph_is_turned_upright(self):
        image = Image.new("RGB", (32, 16), "white")
        image.paste("black", (0, 0, 32, 8))  # the upper half
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise: what was above is now on the right
        fitted = fit_image(encoded(image, "JPEG", exif=exif, quality=100))
        assert fitted.before == (16, 32)
        upright = decoded(fitted.data)
        assert 0x0112 not in upright.getexif()
        assert upright.getpixel((13, 16))[0] < 30 and upright.getpixel((2, 16))[0] > 225

    def test_paths_start_where_they_are_told_to(self, tmp_path, monkeypatch):
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "a.png").write_bytes(png())
        for value in ("a.png", {"path": "a.png", "bytes": None}, str(tmp_path / "pictures" / "a.png")):
            assert fit_image(value, folders=[tmp_path, tmp_path / "pictures"]).after == (32, 24)
        monkeypatch.chdir(tmp_path / "pictures")
        with pytest.raises(BadRow, match="missing image: no file 'a.png'"):
            fit_image("a.png")

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (None, "missing image"),
            ({"bytes": None, "path": None}, "missing image"),
            ("https://example.org/a.png", "missing image"),
            ("/" + "A" * 5000, "missing image"),
            ("\0.png", "missing image"),
            (Image.new("F", (3, 3)), "unreadable image"),
            (b"", "empty image"),
            (Image.new("RGB", (0, 5)), "empty image"),
            (b"GIF89a nonsense", "unreadable image"),
            (png_header(0, 5), "unreadable image"),
            (png_header(10, 10), "unreadable image"),
            (png((200, 200), "blue")[:-60], "unreadable image"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "unreadable image"),
            (encoded(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF"), "unreadable image"),
            (png_header(60_000, 60_000), "huge image"),
            (png_header(10_000, 9_000), "huge image"),
            (png_header(402, 2), "narrow image"),
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_reasons(self, value, reason):
        with pytest.raises(BadRow) as error:
            fit_image(value)
        assert error.value.reason == reason

    def test_the_header_is_checked_before_anything_is_decoded(self, monkeypatch):
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
        for size in ((60_000, 60_000), (10_000, 9_000), (402, 2)):
            with pytest.raises(BadRow):
                fit_image(png_header(*size))


class TestLimits:
    @pytest.mark.parametrize(
        ("size", "fitted"),
        [
            ((512, 512), (512, 512)),
            ((2048, 2048), (2048, 2048)),
            ((256, 256), (512, 512)),
            ((128, 512), (256, 1024)),
            ((4096, 4096), (2048, 2048)),
            ((8192, 2048), (4096, 1024)),
            ((3000, 2000), (2508, 1672)),  # floor(3000 * sqrt(4194304 / 6e6)) = floor(2508.3), floor(1672.2)
            ((100, 100), (512, 512)),
            ((300, 200), (628, 419)),  # ceil(300 * sqrt(262144 / 60000)) = ceil(627.07), ceil(418.05)
        ],
    )
    def test_by_hand(self, size, fitted):
        assert ImageLimits(262_144, 4_194_304).fit(*size) == fitted

    @given(st.integers(1, 4000), st.integers(1, 4000), st.integers(200, 100_000), st.integers(2, 50))
    def test_within_the_limits_and_of_the_same_shape(self, width, height, low, factor):
        width, height = max(width, -(-height // 200)), max(height, -(-width // 200))
        pixels, high = width * height, low * factor
        new_width, new_height = ImageLimits(low, high).fit(width, height)
        if low <= pixels <= high:
            assert (new_width, new_height) == (width, height)
            return
        assert new_width * new_height <= high if pixels > high else new_width * new_height >= low
        scale = math.sqrt((high if pixels > high else low) / pixels)
        assert max(new_width, new_height) <= 200 * min(new_width, new_height)
        # To a pixel, or cut to the widest shape that there may be.
        assert abs(new_width - width * scale) <= 1 or new_width == 200 * new_height
        assert abs(new_height - height * scale) <= 1 or new_height == 200 * new_width

    def test_a_narrow_picture_does_not_become_too_narrow(self):
        """20,000 by 101 pixels are 198 to 1; rounded down to 7,204 by 36 they are 200.1 to 1."""
        assert ImageLimits(max_pixels=262_144).fit(20_000, 101) == (7_200, 36)
        assert ImageLimits(max_pixels=262_144).fit(101, 20_000) == (36, 7_200)

    def test_pixels_are_resized(self):
        fitted = fit_image(png((100, 50), "blue"), ImageLimits(min_pixels=20_000))
        assert (fitted.before, fitted.after) == ((100, 50), (200, 100))
        assert decoded(fitted.data).size == (200, 100)
        assert decoded(fitted.data).getpixel((150, 50)) == (0, 0, 255)

    @pytest.mark.parametrize(
        ("limits", "message"), [((0, None), "min_pixels"), ((None, 10), "max_pixels"), ((500, 400), "must not exceed")]
    )
    def test_that_make_no_sense(self, limits, message):
        with pytest.raises(ValueError, match=message):
            ImageLimits(*limits)


# ---------------------------------------------------------------------------------------------------------------- rows

BAD_ROWS = {
    "empty prompt": row("<image> \n"),
    "empty answer": row(answer=" "),
    "image count": row("<image><image>Find y."),
    "missing image": {"images": [{"bytes": None, "path": "/no/such/file.png"}], "problem": "<image>x", "answer": "1"},
    "empty image": row("<image>e", "1", b""),
    "unreadable image": row("<image>u", "1", b"not a picture"),
    "huge image": row("<image>h", "1", png_header(60_000, 60_000)),
    "narrow image": row("<image>n", "1", png((402, 2))),
}


class TestRows:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_each_reason(self, streaming):
        rows = [row(), *BAD_ROWS.values(), row("<image>Another."), row()]
        kept, report = clean(rows, streaming)
        assert [r["prompt"][0]["content"][1]["text"] for r in kept] == ["Find x.", "Another."]
        assert report.bad == {reason: [i] for i, reason in enumerate(BAD_ROWS, 1)} | {"duplicate": [len(rows) - 1]}
        assert (report.rows, report.kept) == (len(rows), 2)
        assert report.examples["duplicate"] == f"row {len(rows) - 1}: the same as row 0"

    def test_missing_cells(self):
        rows = [row(None), row("<image>x", None), {"images": None, "problem": "<image>x", "answer": "1"}, row()]
        kept, report = clean(rows)
        assert report.bad == {"empty prompt": [0], "empty answer": [1], "image count": [2]}
        assert len(kept) == 1

    def test_only_the_same_question_with_the_same_picture_and_answer_is_a_duplicate(self):
        rows = [row(), row(answer="3"), row("<image>Find y."), row("<image>Find x.", "2", png(colour="blue")), row()]
        kept, report = clean(rows)
        assert len(kept) == 4
        assert report.bad == {"duplicate": [4]}

    @pytest.mark.parametrize("streaming", [False, True])
    def test_strict(self, streaming):
        rows = [row(), row(answer=""), row("<image>Other."), row("<image><image>z")]
        if streaming:
            with pytest.raises(ValueError, match=r"Row 1 of 'data'.*strict=True.*empty answer"):
                clean(rows, streaming, strict=True)
        else:
            with pytest.raises(ValueError, match=r"2 of 4 rows.*strict=True.*empty answer: 1; image count: 3"):
                clean(rows, strict=True)
        kept, report = clean(rows[::2], streaming, strict=True)
        assert (len(kept), report.bad) == (2, {})

    def test_nothing_left_is_an_error(self):
        with pytest.raises(ValueError, match=r"None of the 2 rows of 'data'.*row 0: the answer is ''"):
            clean([row(answer=""), row(answer="")])

    def test_sizes_are_reported(self):
        rows = [
            row("<image>a", "1", png((100, 50))),
            row("<image>b", "1", png((400, 400))),
            row("<image><image>c", "1", png((200, 100)), png((10, 20))),
            row("<image>d", "", png((900, 900))),  # left out: not counted
        ]
        kept, report = clean(rows, limits=ImageLimits(5_000, 40_000))
        assert (report.images, report.resized) == (4, 2)
        assert (report.largest_before, report.largest_after) == ((400, 400), (200, 200))
        assert [[image.size for image in r["images"]] for r in kept] == [
            [(100, 50)],
            [(200, 200)],
            [(200, 100), (50, 100)],
        ]

    def test_a_stream_counts_as_it_goes_and_anew_with_each_pass(self):
        rows = [row(), row(answer=""), row("<image>b"), row()]
        stream, report = clean_prompts(
            Dataset.from_list(rows, features=FEATURES).to_iterable_dataset(), GEOMETRY3K, name="train"
        )
        assert report.rows == 0
        iterator = iter(stream)
        next(iterator)
        assert (report.rows, report.kept) == (1, 1)
        for _ in range(2):
            assert len(list(stream)) == 2
            assert (report.name, report.rows, report.bad) == ("train", 4, {"empty answer": [1], "duplicate": [3]})

    def test_other_columns_stay_but_pictures_do_not(self):
        features = Features({**FEATURES, "id": Value("int64"), "photo": ImageFeature()})
        rows = [{**row(), "id": 7, "photo": {"bytes": png_header(60_000, 60_000), "path": None}}]
        for streaming in (False, True):
            dataset = Dataset.from_list(rows, features=features)
            dataset, _ = clean_prompts(dataset.to_iterable_dataset() if streaming else dataset, GEOMETRY3K)
            (only,) = dataset
            assert set(only) == {"prompt", "images", "answer", "id"}
            assert only["id"] == 7

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.sampled_from(["good", "again", *BAD_ROWS]), min_size=1, max_size=8), st.booleans())
    def test_exactly_the_good_rows_stay_in_their_order(self, kinds, streaming):
        rows, expected, bad = [], [], {}
        for number, kind in enumerate([*kinds, "good"]):
            if kind == "again" and not expected:
                kind = "good"
            if kind == "good":
                rows.append(row(answer=f"answer {number}"))
                expected.append(f"answer {number}")
            else:
                rows.append(row(answer=expected[0]) if kind == "again" else BAD_ROWS[kind])
                bad.setdefault("duplicate" if kind == "again" else kind, []).append(number)
        kept, report = clean(rows, streaming)
        assert [r["answer"] for r in kept] == expected
        assert report.bad == bad
        assert report.rows == len(rows)


class TestGolds:
    """The answers of a table's rows, whatever type they have there."""

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (8, "8"),
            (8.0, "8"),
            (0.5, "0.5"),
            (1e-7, "0.0000001"),
            (-12.0, "-12"),
            (2**53 - 1.0, "9007199254740991"),
            (["4"], "4"),
            ([[4.0]], "4"),
            (True, "True"),
            (datetime(2020, 2, 29), "2020-02-29"),
            (Decimal("1.50"), "1.50"),
        ],
        ids=repr,
    )
    def test_that_are_one_text(self, value, text):
        assert text_cell({"final": value}, "final") == text

    @pytest.mark.parametrize("value", [None, float("nan"), [], [[]], [None], " ", {}], ids=repr)
    def test_that_are_missing(self, value):
        assert not text_cell({"final": value}, "final").strip()

    @pytest.mark.parametrize(
        "value", [["1", "2"], {"value": "4"}, b"4", float("inf"), 1e30, 2.0**53, datetime(2020, 2, 29, 1)], ids=repr
    )
    def test_whose_text_is_not_known(self, value):
        with pytest.raises(BadRow, match="unreadable text: `final` is neither one text nor one exact number"):
            text_cell({"final": value}, "final")

    @pytest.mark.parametrize(
        ("answers", "kept", "bad"),
        [
            ([["4"], [], ["1", "2"]], ["4"], {"empty answer": [1], "unreadable text": [2]}),
            ([{"a": 1}, "x", {"b": 2}], ["x"], {"unreadable text": [0, 2]}),
            ([10**30, 2**63, 5], ["5"], {"unreadable text": [0, 1]}),
            ([math.nan, 5, None], ["5"], {"empty answer": [0, 2]}),
            (["2020-02-29", "1999-12-31"], ["2020-02-29", "1999-12-31"], {}),
        ],
        ids=str,
    )
    def test_of_a_file(self, answers, kept, bad, tmp_path):
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(json.dumps({"problem": f"{i}?", "answer": a}) for i, a in enumerate(answers)))
        rows, _ = load_rows(str(path))
        prompts, report = clean_prompts(rows, own_columns(rows.column_names))
        assert (prompts["answer"], report.bad) == (kept, bad)

    def test_of_prompts_as_they_are(self):
        """A reward function of the user's own may read lists; nothing reads what is not there."""
        rows = Dataset.from_dict({"prompt": ["a", "b"], "answer": [["1", "2"], []]})
        kept, report = clean_prompts(rows)
        assert (kept["answer"], report.bad) == ([["1", "2"]], {"empty answer": [1]})
        rows = Dataset.from_dict({"prompt": ["a", "b"], "answer": [1.5, math.nan]})
        assert clean_prompts(rows)[1].bad == {"empty answer": [1]}


class TestPlaceholders:
    """Texts that stand for pieces of pictures: written out in a question they have no pieces to stand for."""

    @pytest.mark.parametrize("streaming", [False, True])
    def test_of_the_model(self, streaming, qwen2_5_vl_processor):
        rows = [row(), row("<image>Find <|image_pad|>."), row("<image><|video_pad|>?"), row("<image>An image_pad?")]
        for processor in (qwen2_5_vl_processor, None):
            kept, report = clean(rows, streaming, processor=processor)
            assert (len(kept), report.bad) == (2, {"placeholder in text": [1, 2]})
        assert report.examples["placeholder in text"].startswith("row 1: the text has '<|image_pad|>'")

    def test_of_messages(self):
        content = [{"type": "text", "text": "What is <|image_pad|>?"}]
        prompts = [
            [{"role": "user", "content": content}],
            [{"role": "user", "content": [{**content[0], "text": "x"}]}],
        ]
        assert clean_prompts(Dataset.from_dict({"prompt": prompts}))[1].bad == {"placeholder in text": [0]}
        assert clean_prompts(Dataset.from_dict({"prompt": ["<|video_pad|>", "x"]}))[1].bad == {
            "placeholder in text": [0]
        }

    def test_of_other_models(self, qwen2_5_vl_processor, tokenizer, monkeypatch):
        assert placeholders(tokenizer) == ()  # its model reads text alone
        monkeypatch.setattr(qwen2_5_vl_processor, "image_token", "<picture>")
        monkeypatch.setattr(qwen2_5_vl_processor, "audio_token", "<sound>", raising=False)
        assert {"<picture>", "<|video_pad|>", "<sound>"} <= set(placeholders(qwen2_5_vl_processor))


class TestNames:
    @pytest.mark.parametrize("name", ["completion", "completions", "prompts", "completion_ids", "log_metric"])
    def test_that_trl_uses_itself(self, name):
        rows = Dataset.from_dict({"prompt": ["x"], name: ["y"]})
        with pytest.raises(ValueError, match=rf"columns \['{name}'\], but TRL reserves these names. Rename or remove"):
            clean_prompts(rows)
        rows = rows.rename_column("prompt", "problem")
        (only,) = clean_prompts(rows, own_columns(rows.column_names, {"answer": name}))[0]
        assert only == {"prompt": [{"role": "user", "content": "x"}], "answer": "y"}

    def test_that_confuse_trl_beside_pictures(self):
        """TRL takes any of these for the prompt, when it asks whether prompts are messages."""
        features = Features({**FEATURES, "messages": Value("string")})
        rows = Dataset.from_list([{**row(), "messages": "none"}], features=features)
        with pytest.raises(ValueError, match=r"columns \['messages'\]"):
            clean_prompts(rows, GEOMETRY3K)
        assert len(clean_prompts(Dataset.from_dict({"prompt": ["x"], "messages": ["none"]}))[0]) == 1


class TestPromptLength:
    def test_image_tokens_count(self, qwen2_5_vl_processor):
        # 56 by 56 pixels in patches of 14, merged two by two: four image tokens between two marks.
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find AB."}]}]
        text = [{"role": "user", "content": [{"type": "text", "text": "Find AB."}]}]
        image = Image.new("RGB", (56, 56))
        assert count_tokens(qwen2_5_vl_processor, prompt, [image]) == count_tokens(qwen2_5_vl_processor, text) + 6
        tokenizer = qwen2_5_vl_processor.tokenizer
        assert count_tokens(tokenizer, "Find AB.") == len(tokenizer("Find AB.")["input_ids"])
        messages = [{"role": "user", "content": "Find AB."}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert count_tokens(tokenizer, messages) == len(tokenizer(rendered)["input_ids"])

    def test_long_prompts_are_left_out(self, qwen2_5_vl_processor):
        rows = [row("<image>Find AB.", "1", png((56, 56))), row("<image>Find AB+BC+CD+DA.", "1", png((56, 56)))]
        content = [{"type": "image"}, {"type": "text", "text": "Find AB."}]
        limit = count_tokens(
            qwen2_5_vl_processor, [{"role": "user", "content": content}], [Image.new("RGB", (56, 56))]
        )
        kept, report = clean(rows, processor=qwen2_5_vl_processor, max_prompt_length=limit)
        assert (len(kept), report.bad) == (1, {"long prompt": [1]})
        assert f"more than max_prompt_length={limit}" in report.examples["long prompt"]
        with pytest.raises(ValueError, match="needs a `processor`"):
            clean(rows, max_prompt_length=limit)


class TestPromptsAsTheyAre:
    def test_text(self):
        dataset = Dataset.from_dict({"prompt": ["1 + 1?", " ", "1 + 1?", "2 + 2?"], "answer": ["2", "0", "2", None]})
        kept, report = clean_prompts(dataset)
        assert list(kept) == [{"prompt": "1 + 1?", "answer": "2"}]
        assert report.bad == {"empty prompt": [1], "duplicate": [2], "empty answer": [3]}

    def test_messages_with_pictures(self):
        message = [{"role": "user", "content": "What is it?"}]
        rows = [
            {"prompt": message, "image": {"bytes": png(), "path": None}},
            {"prompt": message, "image": {"bytes": b"x", "path": None}},
            {"prompt": [{"role": "user", "content": "And now?"}], "image": None},
        ]
        features = Features(
            {"prompt": List({"role": Value("string"), "content": Value("string")}), "image": ImageFeature()}
        )
        dataset, report = clean_prompts(Dataset.from_list(rows, features=features))
        assert [(r["prompt"], len(r["images"])) for r in dataset] == [(message, 1), (rows[2]["prompt"], 0)]
        assert report.bad == {"unreadable image": [1]}

    def test_pictures_need_a_place(self):
        features = Features({"prompt": Value("string"), "images": List(ImageFeature())})
        rows = [{"prompt": "Look!", "images": [{"bytes": png(), "path": None}]}, {"prompt": "Think!", "images": []}]
        _, report = clean_prompts(Dataset.from_list(rows, features=features))
        assert report.bad == {"image count": [0]}


def test_plain_text_for_models_without_a_chat_template():
    rows = Dataset.from_dict({"problem": ["1 + 1?"], "answer": ["2"]})
    text = own_columns(rows.column_names)
    (only,) = clean_prompts(rows, text, prompt_template="Q: {problem}\nA:", conversational=False)[0]
    assert only == {"prompt": "Q: 1 + 1?\nA:", "answer": "2"}
    (only,) = clean_prompts(rows, text)[0]
    assert only["prompt"] == [{"role": "user", "content": "1 + 1?"}]
    with pytest.raises(ValueError, match="`conversational=False` is for text"):
        clean([row()], conversational=False)


def test_a_stream_must_know_its_features():
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "x"}]))
    with pytest.raises(ValueError, match="features of 'data' must be known"):
        clean_prompts(stream)


def test_reports_are_shown_and_saved(tmp_path: Path):
    _, report = clean([row(), row(answer=""), *[row()] * 10], limits=ImageLimits(min_pixels=3072), name="train")
    console = Console(file=io.StringIO(), width=120)
    console.print(report)
    shown = console.file.getvalue()
    assert "train: 1 of 12 rows" in shown
    assert "1 pictures, 1 resized; the largest 32×24, then 64×48" in shown
    assert "2, 3, 4, 5, 6, 7, 8, 9, … (10 rows)" in shown
    save_reports([report], tmp_path / "out" / "data_report.json")
    saved = json.loads((tmp_path / "out" / "data_report.json").read_text())["train"]
    assert saved["bad"] == {"empty answer": [1], "duplicate": list(range(2, 12))}
    assert (saved["rows"], saved["kept"], saved["largest_after"]) == (12, 1, [64, 48])
