"""Coloured tokens for notebooks, read back with an HTML parser."""

from html.parser import HTMLParser

import pytest
from matplotlib.colors import to_rgb

from sapo_trl.viewer import token_html


HOSTILE = ["<script>alert(1)</script>", '" onmouseover="alert(1)', "</span></div>", "&lt;b&gt;"]


class Spans(HTMLParser):
    """Text, style and title of each token, and every element."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[str] = []
        self.open: list[str] = []
        self.tokens: list[dict[str, str]] = []
        self.heading = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        if tag == "br":
            return
        self.open.append(tag)
        assert set(dict(attrs)) <= {"style", "title"}
        if tag == "span":
            self.tokens.append({**dict(attrs), "text": ""})

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] == "span":
            self.tokens[-1]["text"] += data
        else:
            self.heading += data

    def background(self, place: int) -> tuple[float, ...]:
        style = dict(part.split(":") for part in self.tokens[place]["style"].split(";"))
        return to_rgb(style["background"])

    def bars(self) -> list[int]:
        return [place for place, token in enumerate(self.tokens) if "border-right" in token["style"]]


def luminance(colour: tuple[float, ...]) -> float:
    """As the guidelines for web accessibility define it."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_bar_follows_the_last_token_of_each_segment():
    spans = Spans(token_html(["a", "b", "c", "d", "e"], [0, 0, 1, 2, 2]))
    assert spans.bars() == [1, 2, 4]
    assert [token["title"] for token in spans.tokens] == [f"segment {index}" for index in (0, 0, 1, 2, 2)]
    assert spans.background(0) == spans.background(1) != spans.background(2) != spans.background(3)


def test_line_breaks_are_seen_and_made():
    spans = Spans(token_html(["a\n", "b"], [0, 0]))
    assert [token["text"] for token in spans.tokens] == ["a↵", "b"]
    assert spans.elements.count("br") == 1


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_stays_text(hostile):
    spans = Spans(token_html([hostile, "b"], [0, 1], [0.5, -0.5], title=hostile))
    assert spans.tokens[0]["text"] == spans.heading == hostile
    assert set(spans.elements) == {"div", "span"}


def test_signed_numbers_are_orange_and_blue_and_zero_is_neither():
    spans = Spans(token_html(["a", "b", "c"], [0, 1, 2], [-2.0, 0.0, 1.0]))
    red, green, blue = spans.background(0)
    assert red > blue
    assert max(spans.background(1)) - min(spans.background(1)) < 0.05
    red, green, blue = spans.background(2)
    assert blue > red
    assert spans.tokens[0]["title"] == "segment 0, -2"


def test_what_turns_the_writing_direction_is_written_out():
    html = token_html(["a\u202eb\n", "\u2067c"], [0, 0], title="t\u202e")
    assert not any(control in html for control in "\u202e\u2067")
    assert [token["text"] for token in Spans(html).tokens] == ["a⟨U+202E⟩b↵", "⟨U+2067⟩c"]
    assert Spans(html).heading == "t⟨U+202E⟩"


def test_larger_numbers_are_darker_on_a_common_scale():
    numbers = [0.0, 0.5, 1.0, 5.0]
    spans = Spans(token_html(list("abcd"), [0, 1, 2, 3], numbers, limits=(0, 2)))
    lightness = [luminance(spans.background(place)) for place in range(4)]
    assert lightness == sorted(lightness, reverse=True) and len(set(lightness)) == 4
    # The same number has the same colour in another response, whatever else is in that.
    other = Spans(token_html(["x", "y"], [0, 1], [1.0, 0.1], limits=(0, 2)))
    assert other.background(0) == spans.background(2)


@pytest.mark.parametrize("numbers", [[i / 20 for i in range(21)], [i / 10 - 1 for i in range(21)]])
def test_text_can_be_read_on_every_colour(numbers):
    spans = Spans(token_html(["x"] * 21, [0] * 21, numbers))
    for place, token in enumerate(spans.tokens):
        text = 1.0 if "color:#fff" in token["style"].replace("background:#fff", "") else 0.0
        lighter, darker = sorted((luminance(spans.background(place)), text), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) > 4.5, token


def test_nothing_and_equal_numbers_are_no_error():
    assert Spans(token_html([], [], [])).tokens == []
    assert len(Spans(token_html(["a", "b"], [0, 0], [0.0, 0.0])).tokens) == 2


@pytest.mark.parametrize(("segment_ids", "numbers", "name"), [([0], None, "segment_ids"), ([0, 0], [1.0], "numbers")])
def test_lists_of_other_lengths_are_errors(segment_ids, numbers, name):
    with pytest.raises(ValueError, match=f"`{name}` must have one entry a token, 2, got 1"):
        token_html(["a", "b"], segment_ids, numbers)
