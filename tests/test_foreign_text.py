"""Texts from outside: nothing in them moves, hides or marks up what is around them."""

import re
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from sapo_trl.foreign_text import escape_markdown, visible


def test_by_hand():
    assert visible("a\u202eb\tc\n\x1b[31m\ud800") == "a⟨U+202E⟩b\tc\n⟨U+001B⟩[31m⟨U+D800⟩"
    assert visible("שלום, 你好, é, 👩‍🔬") == "שלום, 你好, é, 👩‍🔬"
    assert escape_markdown("a|b <i>*x*</i>\n[y](z) `c` _d_ &lt;") == (
        r"a\|b \<i\>\*x\*\</i\> \[y\](z) \`c\` \_d\_ \&lt;"
    )


@given(st.text(st.characters(exclude_categories=())))
def test_no_control_is_left(text):
    shown = visible(text)
    shown.encode()
    assert visible(shown) == shown
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for character in shown:
        assert unicodedata.bidirectional(character) not in directions
        assert unicodedata.category(character) != "Cc" or character in "\t\n\r"


@given(st.text(alphabet="ab|\\`*_[]<>&~\n \t\u202e"))
def test_escaped_marks_are_the_text_again(text):
    escaped = escape_markdown(text)
    assert "\n" not in escaped
    assert re.sub(r"\\(.)", r"\1", escaped) == " ".join(visible(text).split())
    assert not re.search(r"[|`*_\[\]<>&~]", re.sub(r"\\.", "", escaped))
