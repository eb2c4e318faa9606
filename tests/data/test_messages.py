"""What the rows of a data set can name: files and addresses in messages, cells and features."""

import base64
import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Audio, Dataset, Features, Json, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from sapo_trl.cli.train import TrainArguments, load_prompts
from sapo_trl.data import clean_prompts, own_columns
from sapo_trl.data.loading import undecoded
from tests.data.test_cleaning import decoded, encoded, png, png_header


class Server:
    """Serves one picture and counts the requests."""

    def __init__(self):
        self.requests: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.path)
                if self.path.startswith("/to/"):
                    self.send_response(302)
                    self.send_header("Location", self.path.removeprefix("/to/"))
                    self.end_headers()
                    return
                body = {"/a.png": png(), "/bomb.png": png_header(60_000, 60_000)}.get(self.path)
                self.send_response(200 if body else 404)
                self.end_headers()
                self.wfile.write(body or b"")

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def messages(*blocks: dict, role: str = "user") -> list[dict]:
    return [{"role": role, "content": [*blocks, {"type": "text", "text": "What is it?"}]}]


def sources(name: str) -> list[dict]:
    """Every way in which a block can name a picture that OpenAI's, transformers' and Qwen's messages have."""
    return [
        {"type": "image", "image": name},
        {"type": "image", "url": name},
        {"type": "image", "path": name},
        {"type": "image_url", "image_url": name},
        {"type": "image_url", "image_url": {"url": name, "detail": "high"}},
    ]


def given(*prompts: list[dict], **columns: list) -> Dataset:
    rows = {"prompt": list(prompts), "answer": [str(number) for number in range(len(prompts))], **columns}
    return Dataset.from_dict(rows, features=None, on_mixed_types="use_json")


# ------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_that_messages_name_is_fetched(server, streaming, qwen2_5_vl_processor):
    address = f"{server.address}/a.png"
    others = [
        {"type": "video", "video": address},
        {"type": "audio", "url": address},
        {"type": "input_audio", "input_audio": {"data": address}},
        {"type": "text", "text": "x", "image": address},
        {"type": "file", "file": {"file_id": address}},
    ]
    prompts = [messages(block) for block in (*sources(address), *others)]
    prompts += [messages(block, role="system") for block in sources(address)]
    rows = given(*prompts, messages())
    # The processor renders each prompt that passes, as the trainer does.
    kept, report = clean_prompts(
        rows.to_iterable_dataset() if streaming else rows, processor=qwen2_5_vl_processor, max_prompt_length=500
    )
    assert [row["answer"] for row in kept] == ["15"]
    assert server.requests == []
    assert report.bad == {
        "missing image": [0, 1, 2, 3, 4, 10, 11, 12, 13, 14],
        "video or sound": [5, 6, 7],
        "unreadable prompt": [8, 9],
    }
    assert "allow_remote_images" in report.examples["missing image"]


def test_nothing_that_cells_name_is_fetched(server, tmp_path):
    address = f"{server.address}/a.png"
    path = tmp_path / "train.jsonl"
    rows = [{"problem": "x", "answer": "1", "images": [address]}, {"problem": "y", "answer": "2", "images": []}]
    path.write_text("\n".join(map(json.dumps, rows)))
    _, report = load_prompts(TrainArguments(dataset_name=str(path)), "train")
    assert (report.bad, server.requests) == ({"missing image": [0]}, [])
    # A parquet file says itself which of its columns are pictures: `datasets` fetches them with the row.
    text, pictures = Value("string"), List({"one": ImageFeature()})
    nested = Features({"prompt": text, "extra": {"pictures": pictures}, "sound": text})
    row = {"prompt": "1 + 1?", "extra": {"pictures": [{"one": {"bytes": None, "path": address}}]}, "sound": address}
    dataset = Dataset.from_list([row], features=nested).cast_column("sound", Audio())
    for streamed in (False, True):
        kept, _ = clean_prompts(dataset.to_iterable_dataset() if streamed else dataset)
        assert list(kept) == [{"prompt": "1 + 1?"}]
    assert server.requests == []


def test_addresses_are_fetched_where_the_user_allows_it(server, tmp_path):
    address = f"{server.address}/a.png"
    names = [address, f"{server.address}/bomb.png", f"{server.address}/none.png"]
    names += [f"{server.address}/to/{address}", f"{server.address}/to/file:///etc/hostname", "http://"]
    rows = [{"prompt": messages({"type": "image", "url": name}), "answer": str(i)} for i, name in enumerate(names)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = TrainArguments(dataset_name=str(tmp_path / "train.jsonl"), allow_remote_images=True)
    kept, report = load_prompts(settings, "train")
    assert [[image.size for image in row["images"]] for row in kept] == [[(32, 24)], [(32, 24)]]
    assert report.bad == {"huge image": [1], "missing image": [2, 4, 5]}
    assert "none.png was refused with status 404" in report.examples["missing image"]


# --------------------------------------------------------------------------------------------------------------- files


def test_pictures_of_messages_pass_the_checks_of_the_column(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "good.png": png(),
        "turned.jpg": encoded(Image.new("RGB", (32, 16)), "JPEG", exif=exif),
        "bomb.png": png_header(60_000, 60_000),
        "narrow.png": png((402, 2)),
        "cut.png": png((200, 200), "blue")[:-60],
        "script.ps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    expected = {"good.png": (32, 24), "turned.jpg": (16, 32)}
    reasons = {"bomb.png": "huge image", "narrow.png": "narrow image", "cut.png": "unreadable image"}
    for name in files:
        absolute = str(tmp_path / name)
        blocks = [*sources(absolute), *sources(f"file://{absolute}"), *sources(name)]
        prompts = [messages(block) for block in blocks]
        kept, report = clean_prompts(given(*prompts, messages()), folders=[tmp_path])
        if name in expected:
            assert report.bad == {}
            assert [image.size for row in kept for image in row["images"]] == [expected[name]] * len(blocks)
        else:
            assert report.bad == {reasons.get(name, "unreadable image"): list(range(len(blocks)))}
        assert [block for row in kept for block in row["prompt"][0]["content"] if block["type"] == "image"] == [
            {"type": "image"}
        ] * (len(blocks) * (name in expected))


def test_pictures_inside_messages():
    text = base64.b64encode(png(colour="blue")).decode()
    blocks = [*sources(f"data:image/png;base64,{text}"), {"type": "image", "base64": text}]
    broken = [{"type": "image", "base64": "no base64!"}, *sources("data:image/png;base64,é")[:1]]
    kept, report = clean_prompts(given(*[messages(block) for block in (*blocks, *broken)]))
    assert [row["images"][0].getpixel((0, 0)) for row in kept] == [(0, 0, 255)] * len(blocks)
    assert report.bad == {"unreadable image": [len(blocks), len(blocks) + 1]}


def test_a_file_too_large_to_be_a_picture_is_not_read(tmp_path, monkeypatch):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**31)  # no room is taken on the disk
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    rows = given(messages({"type": "image", "path": str(tmp_path / "a.png")}), messages())
    assert clean_prompts(rows)[1].bad == {"huge image": [0]}


def test_places_are_filled_in_their_order(tmp_path):
    """Those that name a picture with it, the others with the pictures of the column."""
    for colour in ("red", "green", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour=colour))
    place, green = {"type": "image"}, {"type": "image", "path": "green.png"}
    prompts = [messages(place, green, place), messages(green), messages(place, place, place)]
    prompts += [[{"role": "system", "content": "Look."}, *messages(green), {"role": "user", "content": "And?"}]]
    columns = {"images": [["red.png", "blue.png"], [], ["red.png"], []]}
    kept, report = clean_prompts(given(*prompts, **columns), folders=[tmp_path])
    assert report.bad == {"image count": [2]}
    colours = [[image.getpixel((0, 0)) for image in row["images"]] for row in kept]
    red, green, blue = (255, 0, 0), (0, 128, 0), (0, 0, 255)
    assert colours == [[red, green, blue], [green], [green]]
    assert kept[2]["prompt"][2] == {"role": "user", "content": [{"type": "text", "text": "And?"}]}


def test_blocks_of_a_table_have_empty_keys():
    """Arrow gives each block the keys of all others; TRL and templates would take a key for a picture."""
    text = Value("string")
    block = {"type": text, "text": text, "image": ImageFeature(), "image_url": {"url": text}}
    features = Features({"prompt": List({"role": Value("string"), "content": List(block)})})
    content = [
        {"type": "image", "text": None, "image": {"bytes": png(), "path": None}},
        {"type": "text", "text": "What is it?", "image": None, "image_url": {"url": None}},
    ]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": content}]}], features=features)
    (row,) = clean_prompts(rows)[0]
    assert row["prompt"] == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    assert [image.size for image in row["images"]] == [(32, 24)]


@pytest.mark.parametrize(
    "prompt",
    [
        ["text"],
        [{"content": "no role"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["text"]}],
        [{"role": "user", "content": [{"type": "text", "text": ["a", "b"]}]}],
        [{"role": "user", "content": [{"type": "image", "image": "a.png", "url": "b.png"}]}],
        [{"role": "user", "content": [{"type": "image", "max_pixels": 9}]}],
    ],
    ids=str,
)
def test_messages_that_nobody_can_read(prompt):
    features = Features({"prompt": Json()})
    rows = Dataset.from_list([{"prompt": prompt}, {"prompt": messages()}], features=features)
    assert clean_prompts(rows)[1].bad == {"unreadable prompt": [0]}


def test_calls_of_tools_have_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    (row,) = clean_prompts(given([*messages(), call, *messages()]))[0]
    assert row["prompt"][1] == {name: call[name] for name in ("role", "tool_calls")}


def test_tools_show_no_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    prompt = [*messages(), *messages({"type": "image", "path": "a.png"}, role="tool")]
    assert clean_prompts(given(prompt, messages()), folders=[tmp_path])[1].bad == {"image count": [0]}


def test_features_at_any_depth():
    picture, closed = ImageFeature(), ImageFeature(decode=False)
    inner = {"d": [{"e": picture}], "f": Json()}
    features = Features({"a": picture, "b": List(List(picture)), "c": inner, "g": Json()})
    rows = [{"a": None, "b": [], "c": {"d": [], "f": {}}, "g": 1}]
    dataset, names = undecoded(Dataset.from_list(rows, features=features))
    assert names == ["a", "b", "c"]
    assert dataset.features == Features(
        {"a": closed, "b": List(List(closed)), "c": {"d": [{"e": closed}], "f": Json()}, "g": Json()}
    )


# -------------------------------------------------------------------------------------------------- files as they come


def test_pictures_without_an_image_feature():
    """As tables have them that were written without `datasets`."""
    data, text = png(colour="blue"), base64.b64encode(png(colour="blue")).decode()
    for cell in (
        [{"bytes": data, "path": None}],
        {"bytes": data, "path": "a.png"},
        [{"bytes": text, "path": None}],
        data,
        [data],
    ):
        rows = Dataset.from_list([{"problem": "What is it?", "answer": "1", "images": cell}])
        ((row,), report) = clean_prompts(rows, own_columns(rows.column_names))
        assert (row["images"][0].getpixel((0, 0)), report.bad) == ((0, 0, 255), {})
    for cell in ([{"bytes": [137, 80], "path": None}], [{"bytes": None, "path": 3}], [7]):
        rows = Dataset.from_list([{"problem": "What is it?", "answer": "1", "images": cell}])
        with pytest.raises(ValueError, match="missing image.*neither bytes nor a path"):
            clean_prompts(rows, own_columns(rows.column_names))


@pytest.mark.parametrize("column", ["video", "videos", "audio", "audios"])
def test_rows_with_other_media_are_counted(column):
    rows = Dataset.from_dict({"problem": ["x", "y"], "answer": ["1", "2"], column: [["a.mp4"], []]})
    kept, report = clean_prompts(rows, own_columns(rows.column_names))
    assert report.bad == {"video or sound": [0]}
    assert kept.column_names == ["prompt", "answer"]


def test_decoded_pictures_stay_whole():
    """A picture in a message is the file it was, as one in the column is."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), "red").save(buffer, "JPEG", quality=30)
    text = base64.b64encode(buffer.getvalue()).decode()
    kept, _ = clean_prompts(given(messages({"type": "image", "base64": text})))
    stored = kept.cast_column("images", List(ImageFeature(decode=False)))[0]["images"][0]["bytes"]
    assert stored == buffer.getvalue()
    assert decoded(stored).format == "JPEG"
