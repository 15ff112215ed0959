"""Texts of records: one record of a data set in, one document out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..errors import TextError

WHOLE = ("text", "content")
"""Fields that are the whole document."""
CONVERSATION = ("messages", "conversations", "conversation")
"""Fields that hold a list of messages, each with its text in one of `SAID`."""
PARTS = (
    "system",
    "system_prompt",
    "instruction",
    "context",
    "document",
    "article",
    "passage",
    "dialogue",
    "prompt",
    "input",
    "question",
    "query",
    "output",
    "response",
    "completion",
    "chosen",
    "answer",
    "summary",
    "highlights",
)
"""Fields that together are the document, in the order in which they are read: Alpaca's instruction, input and output,
Dolly's instruction, context and response, LongBench's context and input, prompts with completions or preferences, and
questions with answers."""
SAID = ("content", "value", "text")
"""Fields of a message with its text: OpenAI's, ShareGPT's and that of a part of a message."""


@dataclass
class RecordFields:
    """Fields of the records of one source, in the order in which they were met.

    Attributes:
        read: fields that are in the documents.
        left_out: fields that hold something and are in none.
    """

    read: dict[str, None] = field(default_factory=dict)
    left_out: dict[str, None] = field(default_factory=dict)


_fields: ContextVar[RecordFields | None] = ContextVar("fields", default=None)


@contextmanager
def collected_fields() -> Iterator[RecordFields]:
    """Collect the fields of all records that become documents within this block."""
    fields = RecordFields()
    token = _fields.set(fields)
    try:
        yield fields
    finally:
        _fields.reset(token)


def document(record: Any, where: str) -> str:
    """Return the text of one record: its `text` or `content`, its messages, or all of its `PARTS`.

    What belongs together is separated by a blank line.

    Raises:
        TextError: if the record is no object, has none of these fields, or has one of them that is not text.
    """
    if not isinstance(record, Mapping):
        raise TextError(f"{where}: expected an object with a field 'text', got {type(record).__name__}")
    for name in WHOLE:
        if isinstance(record.get(name), str):
            _collect(record, [name])
            return str(record[name])
    fields = next(([name] for name in CONVERSATION if record.get(name)), [name for name in PARTS if name in record])
    parts = [_said(record[name], f"{where}: field '{name}'") for name in fields if record[name] is not None]
    if not parts:
        found = ", ".join(map(str, record)) or "nothing"
        raise TextError(
            f"{where}: needs a text field ({', '.join(WHOLE)}), {CONVERSATION[0]}, or fields such as instruction, "
            f"input and output, prompt and completion, question and answer; it has {found}"
        )
    _collect(record, fields)
    return "\n\n".join(part for part in parts if part)


def _collect(record: Mapping[str, Any], read: list[str]) -> None:
    fields = _fields.get()
    if fields is not None:
        fields.read.update(dict.fromkeys(read))
        others = [name for name in record if name not in read and record[name] not in (None, "", [], {})]
        fields.left_out.update(dict.fromkeys(map(str, others)))


def has_text(record: Mapping[str, Any]) -> bool:
    """Return whether a record has a field that is read."""
    return any(name in record for name in (*WHOLE, *CONVERSATION, *PARTS))


def _said(value: Any, where: str) -> str:
    """Return the text of a field: a string, or a list of strings or messages. Raises TextError for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        said = next((value[name] for name in SAID if name in value), None)
        if said is not None:
            return _said(said, where)
        raise TextError(f"{where} has a message without text; it has {', '.join(map(str, value)) or 'nothing'}")
    if isinstance(value, list):
        return "\n\n".join(text for each in value if (text := _said(each, where)))
    raise TextError(f"{where} is {type(value).__name__}, not text or a list of messages")
