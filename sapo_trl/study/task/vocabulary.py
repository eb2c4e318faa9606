"""The words of the task; each is one token of its tokenizer."""

import itertools


CELLS = "ABCD"
"""The picture's cells, row by row."""

LABELS = "abcdefghijklmnop"
"""Names of a problem's gates, in their order."""

SIGNS = tuple(first + vowel + last for vowel, first, last in itertools.product("aeiou", "bdfgklmnprtv", ("k", "n")))
"""Made-up words, such as `bak`."""

FILLER_WORDS = ("so", "now", "then", "here", "well", "thus", "next", "also")

PREAMBLE = ":"
"""Opens the line of free words before the first step."""

RIGHT, WRONG = "ok", "bad"
"""The remarks on a right and on a wrong decision."""
