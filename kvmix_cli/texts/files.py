"""Text from files and folders: plain text, and records in JSON, JSON lines, CSV, Parquet or Arrow."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import TextError
from ..files import is_device
from .hub import is_saved, rows_of, saved_texts
from .records import document, has_text
from .tokens import check_text

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
"""A record a line."""
JSON = (".json", ".json.gz")
"""A record, a list of records or texts, or a record a line, as in C4's shards; anything else in JSON is a text."""
SEPARATED = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
"""A record a row, its fields named in the first one."""
TABLES = (".parquet", ".arrow")
MAX_FIELD = 2**31 - 1
"""Characters of a field in a table of separated values; the csv module takes 131072 unless told."""
_SNIFF = 8192


def path_texts(path: Path, held_out: bool) -> list[str]:
    """Return the documents of a file or folder. Raises TextError."""
    if is_saved(path):
        return saved_texts(path, None, held_out)
    if path.is_dir():
        return [text for file in _text_files(path) for text in _file_texts(file)]
    if not path.exists():
        raise TextError(
            f"no text at {path}: no such file or folder (names are builtin, builtin-library, wikitext2 and "
            "c4; a data set of the hub is hub:NAME)"
        )
    return _file_texts(path)


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 text file, without a byte-order mark; one that ends in `.gz` is decompressed.

    Raises:
        TextError: if it cannot be read, is a device, or is not UTF-8 text.
    """
    try:
        if is_device(path):
            raise TextError(f"{path} is a device: give a text file")
        data = path.read_bytes()
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error
    return decoded(_decompressed(data, path) if _has(path, (".gz",)) else data, path)


def decoded(data: bytes, name: Path | str) -> str:
    """Return UTF-8 text without a byte-order mark, its lines ended as Python ends them, also those of Windows.

    Args:
        name: file that it is from, for errors.

    Raises:
        TextError: if it is binary, or in another encoding.
    """
    if _is_binary(data):
        raise TextError(f"{name} is a binary file: give UTF-8 text")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise TextError(f"{name} is not UTF-8 text (byte {error.start}): convert it first") from error


def _text_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that look like text, in order of their names; hidden ones are passed over."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        has_records = _has(path, (*LINES, *JSON, *SEPARATED, *TABLES))
        if path.is_file() and not hidden and (has_records or _looks_like_text(path)):
            yield path


def _looks_like_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return not _is_binary(file.read(_SNIFF))
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error


def _is_binary(data: bytes) -> bool:
    return b"\0" in data[:_SNIFF]


def _file_texts(path: Path) -> list[str]:
    if _has(path, TABLES):
        return [document(row, f"{path}, row {i}") for i, row in enumerate(rows_of(path))]
    text = read_text(path)
    if _has(path, LINES):
        return _line_texts(text, path)
    if _has(path, JSON):
        return _json_texts(text, path)
    for ending, separator in SEPARATED.items():
        if _has(path, (ending,)):
            return _separated_texts(text, path, separator)
    return [text]


def _has(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(endings)


def _decompressed(data: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TextError(f"{path} is no whole gzip file ({error}): get it again") from error


def _line_texts(text: str, path: Path) -> list[str]:
    """Return the documents of JSON lines."""
    lines = enumerate(text.split("\n"), 1)  # not `splitlines`: JSON may have other line ends inside its strings
    return [document(_parse(line, f"{path}, line {i}"), f"{path}, line {i}") for i, line in lines if line.strip()]


def _json_texts(text: str, path: Path) -> list[str]:
    """Return the documents of a record, a list of records or texts, or JSON lines; other JSON is itself a text.

    Raises:
        TextError: for JSON that is damaged, or holds records in a form that is not read.
    """
    start = text.lstrip()[:1]
    if start == "{" and _is_record(text.lstrip().split("\n", 1)[0]):
        return _line_texts(text, path)
    value = _parse(text, str(path)) if start and start in "[{" else None
    if isinstance(value, dict) and (has_text(value) or any(map(_has_records, value.values()))):
        return [document(value, str(path))]
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return value
    if _has_records(value):
        return [document(each, f"{path}, record {i}") for i, each in enumerate(value)]
    return [text]


def _has_records(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and any(isinstance(each, dict) for each in value)


def _is_record(line: str) -> bool:
    """Return whether a line is a JSON object of its own."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _separated_texts(text: str, path: Path, separator: str) -> list[str]:
    """Return the documents of a table of separated values."""
    limit = csv.field_size_limit(MAX_FIELD)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True, restkey="(no name)")
    try:
        names = rows.fieldnames or []
        if len(set(names)) < len(names):
            raise TextError(f"{path}, line 1: two columns have the same name; it has {', '.join(names)}")
        return [document(row, f"{path}, line {rows.line_num}") for row in rows]
    except csv.Error as error:
        raise TextError(f"{path}, line {rows.line_num}: no valid table of separated values ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _parse(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where}: not valid JSON ({error})") from error
    if "\\u" in text:
        check_text(json.dumps(value, ensure_ascii=False), where)
    return value
