"""The text of one record of a data set."""

from __future__ import annotations

from typing import Any

from ..errors import TextError

WHOLE = ("text", "prompt", "content")
PARTS = ("context", "input")
"""As in LongBench."""


def document(record: Any, where: str) -> str:
    """The text of one record: `text`, `prompt` or `content`; else `context` and `input` together.

    Raises:
        TextError: if the record is no object, or has none of these as a string.
    """
    if not isinstance(record, dict):
        raise TextError(f"{where}: expected an object with a field 'text', got {type(record).__name__}")
    for name in WHOLE:
        if isinstance(record.get(name), str):
            return str(record[name])
    parts = [record[name] for name in PARTS if isinstance(record.get(name), str)]
    if not parts:
        found = ", ".join(map(str, record)) or "nothing"
        raise TextError(f"{where}: needs a text field text, prompt, content, context or input; it has {found}")
    return "\n\n".join(part for part in parts if part)
