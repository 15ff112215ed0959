"""Text from files made safe to show: no control characters reach a terminal, a page or a table."""

from __future__ import annotations

import re

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Control characters but for tab and line feed, marks that change the direction of text, and what is no character."""


def printable(text: str) -> str:
    """Return a text of any number of lines with a question mark for each character that cannot be shown."""
    return UNPRINTABLE.sub("?", text)


def one_line(text: str) -> str:
    """Return a text on one line, with a question mark for each character that cannot be shown."""
    return " ".join(printable(text).split())


def shortened(text: str, characters: int) -> str:
    """Return a text of at most so many characters, its middle left out if it is longer."""
    if len(text) <= characters:
        return text
    head = (characters - 1) // 2
    return f"{text[:head]}…{text[len(text) - (characters - 1 - head) :]}"
