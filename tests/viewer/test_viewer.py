"""`sapo-trl view` without a browser: what is read from runs, and what the page is given."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sapo_trl.cli import main
from sapo_trl.recordings.run import run_names
from sapo_trl.viewer import payload as payload_module
from sapo_trl.viewer import read_recording, write_page
from sapo_trl.viewer.payload import build_payload
from tests.viewer.recorded_runs import SETTINGS, recorded_response, write_log, write_rollout


NUMBERS = ("logps", "entropies", "values", "advantages", "returns")
TYPES = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "f2": np.float16}


def unpacked(payload) -> dict[str, np.ndarray]:
    """The columns as a browser reads them."""
    raw = gzip.decompress(base64.b64decode(payload.tokens))
    total = sum(payload.meta["responses"]["length"])
    columns = {}
    for column in payload.meta["columns"]:
        kind = TYPES[column["type"]]
        assert column["offset"] % np.dtype(kind).itemsize == 0  # else typed arrays refuse it
        data = np.frombuffer(raw, kind, total, column["offset"])
        columns[column["name"]] = data.astype(np.float64) * column["scale"] if column["type"] == "f2" else data
    return columns


def payload_of(folder, max_tokens=10**6):
    return build_payload([read_recording(folder)], max_tokens)


def cuts(payload, response: int) -> dict[str, list[int]]:
    """For each segmenter the tokens after which it cuts a response."""
    starts = np.concatenate([[0], np.cumsum(payload.meta["responses"]["length"])])
    marks = unpacked(payload)["marks"][starts[response] : starts[response + 1]]
    return {name: np.flatnonzero((marks >> bit) & 1).tolist() for bit, name in enumerate(payload.meta["segmenters"])}


class TestNumbers:
    def test_columns_are_what_was_recorded_to_three_digits(self, tmp_path):
        rows = [recorded_response([f"t{i}" for i in range(length)], seed=length) for length in (5, 1, 9, 0)]
        write_rollout(tmp_path / "segments", rows)
        payload = payload_of(tmp_path)
        columns = unpacked(payload)
        assert payload.meta["responses"]["length"] == [5, 1, 9, 0]
        assert [payload.meta["vocabulary"][index] for index in columns["token"]] == sum(
            (r["tokens"] for r in rows), []
        )
        for name in NUMBERS:
            expected = np.array(sum((row[name] for row in rows), []))
            np.testing.assert_allclose(columns[name], expected, rtol=2**-11, atol=1e-7)
        ratios = pd.read_parquet(tmp_path / "segments" / "ratios_000000_000.parquet")["log_ratios"]
        np.testing.assert_allclose(columns["log_ratios"], np.concatenate(ratios), rtol=2**-11, atol=1e-7)

    def test_numbers_beyond_float16_and_numbers_that_are_none(self, tmp_path):
        row = recorded_response(["a", "b", "c"], returns=[1e7, -2e6, 3.0], advantages=[np.nan, 0.5, -0.5], reward=None)
        write_rollout(tmp_path, [row, recorded_response(["d"], reward=0.25)])
        payload = payload_of(tmp_path)
        np.testing.assert_allclose(unpacked(payload)["returns"][:2], [1e7, -2e6], rtol=1e-3)
        assert np.isnan(unpacked(payload)["advantages"]).tolist() == [True, False, False, False]
        assert payload.meta["responses"]["reward"] == [None, 0.25]
        json.dumps(payload.meta, allow_nan=False)  # NaN is no JSON

    def test_more_than_65536_different_tokens(self, tmp_path):
        tokens = [f"t{i}" for i in range(70_000)]
        write_rollout(tmp_path, [recorded_response(tokens)])
        payload = payload_of(tmp_path)
        assert [payload.meta["vocabulary"][index] for index in unpacked(payload)["token"]] == tokens

    def test_masked_tokens_are_where_they_were(self, tmp_path):
        row = recorded_response(["a", "b"], masked_tokens=["X", "Y", "Z"], masked_positions=[1, 1, 2])
        write_rollout(tmp_path, [row, recorded_response([], masked_tokens=["W"], masked_positions=[0])])
        payload = payload_of(tmp_path)
        columns = unpacked(payload)
        assert [payload.meta["vocabulary"][i] for i in columns["token"]] == ["a", "X", "Y", "b", "Z", "W"]
        assert columns["masked"].tolist() == [0, 1, 1, 0, 1, 1]
        assert np.isnan(columns["values"]).tolist() == [False, True, True, False, True, True]
        assert cuts(payload, 0)["recorded"] == [3]  # across the hole

    def test_thinned_evenly(self, tmp_path):
        for step in range(10):
            write_rollout(tmp_path, [recorded_response(["a"] * 10) for _ in range(10)], step=step)
        meta = payload_of(tmp_path, max_tokens=500).meta
        assert len(meta["responses"]["run"]) == 50 and set(meta["responses"]["step"]) == set(range(10))
        assert any("50 of 100 recorded responses" in note for note in meta["notes"])
        assert len(payload_of(tmp_path, max_tokens=1000).meta["responses"]["run"]) == 100


class TestCuts:
    TOKENS = ["Step 1: ", "a", "\n", "Step 2: ", "b", "c", "\n", "d", "e", "<|im_end|>"]

    @pytest.fixture
    def payload(self, tmp_path):
        # Highest first: tokens 4, 0, 7, 2, 9.
        entropies = [0.9, 0.0, 0.7, 0.0, 1.0, 0.0, 0.0, 0.8, 0.0, 0.6]
        segment_ids = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
        # A longer one beside it, so that the first is padded, and the first with a tool's token in it.
        row = recorded_response(self.TOKENS, entropies=entropies, segment_ids=segment_ids)
        rows = [row, recorded_response(["x"] * 31), {**row, "masked_tokens": ["tool"], "masked_positions": [5]}]
        write_rollout(tmp_path, rows)
        return payload_of(tmp_path)

    def test_by_hand(self, payload):
        found = cuts(payload, 0)
        assert found["recorded"] == [2, 6, 9]
        assert found["entropy, top 10 %"] == [4, 9]
        assert found["entropy, top 20 %"] == [0, 4, 9]
        assert found["entropy, top 30 %"] == [0, 4, 7, 9]
        assert found["entropy, top 50 %"] == [0, 2, 4, 7, 9]
        assert found["lines"] == [2, 6, 9]
        assert found["steps"] == [2, 9]

    def test_as_many_at_random(self, payload):
        for response, count in ((0, 3), (1, 11)):
            assert len(cuts(payload, response)["random, as many as recorded"]) == count

    def test_masked_tokens_shift_and_end_a_turn(self, payload):
        """The recorded cuts stay. All other segmenters also cut before the tool's token, behind token 4."""
        whole, with_hole = cuts(payload, 0), cuts(payload, 2)
        at_random = "random, as many as recorded"
        for name in whole.keys() - {at_random}:
            places = whole[name] if name == "recorded" else sorted({*whole[name], 4})
            assert with_hole[name] == [place + (place >= 5) for place in places]
        assert {4, 10} <= set(with_hole[at_random]) and len(with_hole[at_random]) == 4


class TestReading:
    def test_files_of_earlier_versions(self, tmp_path):
        row = recorded_response(["a", "<|im_end|>"])
        for name in ("special", "masked_tokens", "masked_positions"):
            del row[name]
        (tmp_path / "segments_000000_000.json").write_text(json.dumps(row) + "\n")
        meta = payload_of(tmp_path).meta
        assert [meta["vocabulary"][index] for index in meta["special"]] == ["<|im_end|>"]
        assert any("no importance ratios" in note for note in meta["notes"])
        assert "log_ratios" not in meta["ranges"]

    def test_without_a_critic_no_values(self, tmp_path):
        write_rollout(tmp_path, [recorded_response(["a", "b"], values=[0.0, 0.0])])
        meta = payload_of(tmp_path).meta
        assert "values" not in meta["ranges"] and "The run had no values." in meta["notes"]

    def test_log_and_monte_carlo_values(self, tmp_path):
        write_rollout(tmp_path / "segments", [recorded_response(["a", "b", "c"]) for _ in range(2)], step=4)
        columns = {"response": [1, 1], "token": [0, 2], "segment": [0, 1], "value": [0.1, 0.2]}
        (tmp_path / "values").mkdir()
        pd.DataFrame({**columns, "monte_carlo_value": [0.5, 0.75], "standard_error": [0.1, np.nan]}).to_parquet(
            tmp_path / "values" / "values_000004_000.parquet"
        )
        write_log(tmp_path, [{"step": 4, "reward": 0.5}, {"step": 8, "reward": 0.75}, {"step": 8, "train_loss": 1.0}])
        meta = payload_of(tmp_path).meta
        assert meta["monte_carlo"] == {1: [[0, 0.5, 0.1], [2, 0.75, None]]}
        assert meta["curves"] == [{"reward": [[4, 8], [0.5, 0.75]]}]
        assert meta["notes"] == []

    def test_a_short_log_keeps_its_numbers(self, tmp_path):
        """As of a run of one log entry and the trainer's last one: `epoch` alone is there twice."""
        entries = [{"step": 10, "reward": 0.5, "epoch": 1.0}, {"step": 10, "train_loss": 1.0, "epoch": 1.0}]
        write_log(tmp_path, entries)
        short = {"epoch": [[10, 10], [1.0, 1.0]], "reward": [[10], [0.5]], "train_loss": [[10], [1.0]]}
        assert payload_of(tmp_path).meta["curves"] == [short]
        write_log(tmp_path, [{"step": 5, "reward": 0.25, "epoch": 0.5}, *entries])
        curves = {"epoch": [[5, 10, 10], [0.5, 1.0, 1.0]], "reward": [[5, 10], [0.25, 0.5]]}
        assert payload_of(tmp_path).meta["curves"] == [curves]

    def test_verdicts_and_settings(self, tmp_path):
        verdict = {"reward_names": ["right\u202e"], "reward_weights": [0.5], "reward_values": [None]}
        write_rollout(tmp_path, [recorded_response(["a"], answer="\u202e42", **verdict), recorded_response(["b"])])
        (tmp_path / "run.json").write_text(json.dumps({**SETTINGS, "other_settings": {"top_p": None}}))
        meta = payload_of(tmp_path).meta
        assert meta["responses"]["answer"] == ["⟨U+202E⟩42", None]
        assert meta["responses"]["rewards"] == [[["right⟨U+202E⟩", None, 0.5]], []]
        assert meta["settings"][0]["differences"] == [["critic", "ladder"]]
        assert meta["settings"][0]["other_settings"] == [["top_p", "None"]]
        json.dumps(meta, allow_nan=False)

    def test_log_alone(self, tmp_path):
        write_log(tmp_path, [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 1.0}])
        payload = payload_of(tmp_path)
        assert payload.meta["responses"]["run"] == [] and unpacked(payload)["token"].size == 0
        (hint,) = (note for note in payload.meta["notes"] if "No responses were recorded" in note)
        # For a user of the command line, and for one of Python.
        assert "`--record_every 1`" in hint and "SegmentationCallback(" in hint

    def test_completions_tables_of_trl(self, tmp_path):
        write_log(tmp_path, [{"step": s, "rewards/right/mean": 0.5, "rewards/short/mean": 0.1} for s in (1, 2)])
        (tmp_path / "completions").mkdir()
        question = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Why?"}]}]
        answer = [{"role": "assistant", "content": "So."}]
        for step, prompt, completion, right in ((1, "plain", "Yes", 1.0), (2, question, answer, np.nan)):
            columns = {
                "step": step,
                "prompt": [prompt],
                "completion": [completion],
                "right": right,
                "short": right / 2,
            }
            frame = pd.DataFrame({**columns, "logged_by_a_reward": 7.0, "advantage": 0.2})
            frame.to_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        meta = payload_of(tmp_path).meta
        assert meta["responses"]["reward"] == [1.5, None]
        assert meta["vocabulary"] == ["Yes", "So."]
        assert [prompt["text"] for prompt in meta["prompts"]] == ["plain", "[image]Why?"]

    def test_prompts_are_there_once_and_without_rows_of_placeholders(self, tmp_path):
        prompt = "<|vision_start|>" + "<|image_pad|>" * 300 + "<|vision_end|>Why?"
        write_rollout(tmp_path, [recorded_response(["a"], prompt=prompt), recorded_response(["b"], prompt=prompt)])
        meta = payload_of(tmp_path).meta
        assert [p["text"] for p in meta["prompts"]] == ["<|vision_start|><|image_pad|> ×300 <|vision_end|>Why?"]
        assert meta["responses"]["prompt"] == [0, 0]

    def test_images(self, tmp_path, monkeypatch):
        folder = tmp_path / "segments"
        (folder / "images").mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / "noise.png")
        first = {"images": ["noise.png"], "corrupted_images": ["noise.png"]}
        rows = [recorded_response(["a"], **first), recorded_response(["b"], images=["gone.png"])]
        write_rollout(folder, rows)
        meta = payload_of(tmp_path).meta
        file = (folder / "images" / "noise.png").read_bytes()
        assert meta["images"] == [f"data:image/png;base64,{base64.b64encode(file).decode()}"]
        assert [prompt["images"] for prompt in meta["prompts"]] == [[0], []]
        assert meta["responses"]["corrupted"] == [[0], []]
        assert any("1 images are not where they were" in note for note in meta["notes"])
        monkeypatch.setattr(payload_module, "IMAGE_BYTES", 20_000)
        meta = payload_of(tmp_path).meta
        assert meta["images"][0].startswith("data:image/webp") and len(meta["images"][0]) < 20_000 * 4 / 3 + 100
        assert any("Images are shrunk" in note for note in meta["notes"])

    @pytest.mark.parametrize(
        "name", ["/key.png", "../../key.png", "link.png", "fake.png", "huge.png", "..", "x" * 5000, "\x00"]
    )
    def test_no_recording_brings_another_file_into_the_page(self, name, tmp_path):
        """A recording of someone else's, and files of this machine that are none of its images."""
        secret = tmp_path / "key.png"
        Image.new("RGB", (8, 8), "navy").save(secret)
        folder = tmp_path / "run" / "segments"
        (folder / "images").mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(folder / "images" / "own.png")
        (folder / "images" / "link.png").symlink_to(secret)
        (folder / "images" / "fake.png").write_text("no picture")
        Image.new("1", (4097, 4096)).save(folder / "images" / "huge.png")  # 10 kB that decode to 16 MB
        name = str(secret) if name == "/key.png" else name
        write_rollout(folder, [recorded_response(["a"], images=["own.png", name])])
        meta = payload_of(tmp_path / "run").meta
        own = base64.b64encode((folder / "images" / "own.png").read_bytes()).decode()
        assert meta["images"] == [f"data:image/png;base64,{own}"]
        assert any("1 images are left out, such as" in note for note in meta["notes"])

    def test_nor_does_a_linked_folder(self, tmp_path):
        (tmp_path / "private").mkdir()
        Image.new("RGB", (8, 8), "navy").save(tmp_path / "private" / "passport.png")
        write_rollout(tmp_path / "run", [recorded_response(["a"], images=["passport.png"])])
        (tmp_path / "run" / "images").symlink_to(tmp_path / "private")
        assert payload_of(tmp_path / "run").meta["images"] == []

    def test_the_page_is_not_written_through_a_link(self, tmp_path):
        mine = tmp_path / "mine"
        mine.write_text("mine")
        write_rollout(tmp_path / "run", [recorded_response(["a"])])
        (tmp_path / "run" / "view.html").symlink_to(mine)
        assert main(["view", str(tmp_path / "run")]) == 0
        assert mine.read_text() == "mine" and (tmp_path / "run" / "view.html").stat().st_size > 10_000

    @pytest.mark.parametrize("masked", [[], ["W"]])
    def test_a_run_without_a_single_loss_token(self, masked, tmp_path):
        row = recorded_response([], masked_tokens=masked, masked_positions=[0] * len(masked))
        write_rollout(tmp_path, [row, row])
        payload = payload_of(tmp_path)
        assert payload.meta["responses"]["length"] == [len(masked)] * 2
        assert unpacked(payload)["masked"].tolist() == [1] * len(masked) * 2

    def test_a_line_that_was_cut_is_left_out(self, tmp_path, capsys):
        """Of a run that was killed; texts may hold what looks like the end of a line."""
        rows = [recorded_response(["a\u2028", "b\x85é"]), recorded_response(["c", "dé"])]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path = tmp_path / "segments_000000_000.json"
        path.write_bytes(lines)
        assert not any("cut" in note for note in payload_of(tmp_path).meta["notes"])
        within_a_character = lines.rindex("é".encode()) + 1
        for end in (len(lines) - 2, within_a_character):
            path.write_bytes(lines[:end])
            meta = payload_of(tmp_path).meta
            assert meta["vocabulary"] == ["a\u2028", "b⟨U+0085⟩é"]
            assert any(f"{path}: the last line is cut" in note for note in meta["notes"])
        path.write_bytes(lines[:20])
        with pytest.raises(SystemExit):
            main(["view", str(tmp_path)])
        assert f"{path}: there is no whole line in it" in capsys.readouterr().err
        path.write_bytes(b"{}{\n" + lines)
        with pytest.raises(SystemExit):
            main(["view", str(tmp_path)])
        assert f"{path}, line 1: not JSON" in capsys.readouterr().err

    def test_names_that_tell_runs_apart(self, tmp_path):
        assert run_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
        assert run_names([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
        assert run_names([tmp_path / "a", tmp_path / "a"]) == ["a (1)", "a (2)"]


class PageParser(HTMLParser):
    """Tags with their attributes, and the texts of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


class TestPage:
    HOSTILE = [
        "</script><script>alert(1)</script>",
        "<!--<script>",
        "<img src=x onerror=alert(1)>",
        "\u2028",
        "{{ 7 }}",
    ]

    def test_hostile_text_stays_data(self, tmp_path):
        run = tmp_path / "<img src=x onerror=alert(1)>"
        write_rollout(run, [recorded_response(self.HOSTILE, prompt="".join(self.HOSTILE))])
        write_page([read_recording(run)], tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        page = PageParser(text)
        # The two of the page's own, and the data.
        assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == [
            "application/json",
            "text/plain",
            None,
            None,
        ]
        assert not [attributes for tag, attributes in page.tags if "onerror" in attributes]
        assert json.loads(page.scripts[0])["vocabulary"] == self.HOSTILE
        assert "\u2028" not in text

    def test_what_turns_the_writing_direction_is_seen_and_does_not_turn_it(self, tmp_path):
        hostile = "safe \u202egpj.exe\u2066\x1b[2J"
        run = tmp_path / "run\u202e"
        write_rollout(
            run,
            [recorded_response([hostile], prompt=hostile, masked_tokens=["\u200f"], masked_positions=[1])],
        )
        write_log(run, [{"step": step, f"metric {hostile}": 1.0} for step in (1, 2)])
        write_page([read_recording(run)], tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        meta = json.loads(PageParser(text).scripts[0])
        assert meta["vocabulary"] == ["safe ⟨U+202E⟩gpj.exe⟨U+2066⟩⟨U+001B⟩[2J", "⟨U+200F⟩"]
        shown = [meta["prompts"][0]["text"], meta["runs"][0], *meta["curves"][0], text]
        assert all("⟨U+202E⟩" in each and "\u202e" not in each for each in shown)

    def test_nothing_is_loaded(self, tmp_path):
        write_rollout(tmp_path / "run", [recorded_response(["a"])])
        write_page([read_recording(tmp_path / "run")], tmp_path / "page.html")
        page = PageParser((tmp_path / "page.html").read_text(encoding="utf-8"))
        for tag, attributes in page.tags:
            assert not {"src", "srcset", "action"} & attributes.keys()
            assert tag != "link" or attributes["href"] == "data:,"
        policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none';") and "'unsafe-eval'" not in policy
        assert re.search(r"script-src 'sha256-[^']+' 'sha256-[^']+';", policy)


WRONG = {
    "tokens": [[1, 2], "ab", ["a", None], [["a"], ["b"]]],
    "segment_ids": [[0.5, 1.5], [0, 10**12], [1, 1], ["0", "1"], 3],
    "logps": [["-0.5", "-1"], "ab", {"a": 1}, [[0.1], [0.2, 0.3]]],
    "special": ["ab", [1, 2], [True]],
    "reward": ["high", [1.0], 10**400],
    "prompt": [None, 3],
    "images": [[1], "x.png"],
    "corrupted_images": [[1], "x.png"],
    "answer": [3, ["a"]],
    "reward_names": ["right", [1]],
    "reward_values": [["1"], 1.0],
    "td_errors": [["1", "2"]],
    "masked_tokens": [["t"], 5],
    "masked_positions": [[7], ["0"]],
}


class TestCommand:
    @pytest.mark.parametrize(
        ("column", "value"), [(column, value) for column, values in WRONG.items() for value in values]
    )
    def test_a_wrong_type_in_a_recording_names_the_file_and_the_column(self, column, value, tmp_path, capsys):
        row = recorded_response(["a", "b"]) | {column: value}
        path = tmp_path / "segments_000000_000.json"
        path.write_text(json.dumps(recorded_response(["a", "b"])) + "\n" + json.dumps(row) + "\n")
        with pytest.raises(SystemExit) as exit_:
            main(["view", str(tmp_path)])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and error.count("\n") == 1
        assert str(path) in error and f"`{column}`" in error

    @pytest.mark.parametrize(
        ("name", "columns"),
        [
            ("ratios_000000_000.parquet", {"response": [0], "log_ratios": ["none"]}),
            (
                "values_000000_000.parquet",
                {"response": [0], "token": ["x"], "monte_carlo_value": [0.5], "standard_error": [0.1]},
            ),
            ("trainer_state.json", {"log_history": {"step": 1}}),
            ("trainer_state.json", [1]),
        ],
    )
    def test_so_does_a_wrong_type_in_a_file_beside_it(self, name, columns, tmp_path, capsys):
        write_rollout(tmp_path, [recorded_response(["a"])], log_ratios=False)
        if name.endswith(".json"):
            (tmp_path / name).write_text(json.dumps(columns))
        else:
            pd.DataFrame(columns).to_parquet(tmp_path / name)
        with pytest.raises(SystemExit) as exit_:
            main(["view", str(tmp_path)])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and error.count("\n") == 1 and str(tmp_path / name) in error

    def test_two_runs(self, tmp_path, capsys):
        for name in ("a", "b"):
            write_rollout(tmp_path / name / "segments", [recorded_response(["x", "y"])])
            write_log(tmp_path / name, [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 1.0}])
        assert main(["view", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
        assert "2 responses" in capsys.readouterr().out
        assert (tmp_path / "a" / "view.html").is_file()
        assert main(["view", str(tmp_path / "a"), "--output", str(tmp_path / "new" / "one.html")]) == 0
        assert (tmp_path / "new" / "one.html").is_file()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere"], "nowhere: there is no such folder."),
            (["empty"], "neither responses nor a log. To record them, add `--record_every 1`"),
            (["empty", "empty", "empty"], "one run or two can be viewed, got 3."),
            (["run", "--max_tokens", "0"], "`max_tokens` must be at least 1, got 0."),
            (["damaged"], "segments_000000_000.parquet: not a parquet file"),
            (["uneven"], "response 0 has 2 `tokens`, but {'values': 1}"),
            (["lacking"], "column `tokens` is missing"),
        ],
    )
    def test_bad_input_ends_with_one_line(self, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(tmp_path)
        for name in ("empty", "damaged", "lacking"):
            (tmp_path / name).mkdir()
        (tmp_path / "damaged" / "segments_000000_000.parquet").write_text("no")
        frame = pd.DataFrame([recorded_response(["a"])]).drop(columns="tokens")
        frame.to_parquet(tmp_path / "lacking" / "segments_000000_000.parquet")
        write_rollout(tmp_path / "uneven", [recorded_response(["a", "b"], values=[0.5])])
        write_rollout(tmp_path / "run", [recorded_response(["a"])])
        with pytest.raises(SystemExit) as exit_:
            main(["view", *arguments])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and message in error and error.count("\n") == 1
        assert not list(tmp_path.rglob("view.html"))
