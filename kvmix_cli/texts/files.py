"""Text from files and folders: plain text, and rows in JSON lines, Parquet or Arrow."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import TextError
from .hub import is_saved, rows_of, saved_texts
from .records import document

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
"""A record a line. C4's shards are `.json.gz`."""
TABLES = (".parquet", ".arrow")
_SNIFF = 8192


def path_texts(path: Path, held_out: bool) -> list[str]:
    """Documents of a file or folder. Raises TextError."""
    if is_saved(path):
        return saved_texts(path, None, held_out)
    if path.is_dir():
        return [text for file in _text_files(path) for text in _file_texts(file)]
    if not path.exists():
        raise TextError(
            f"no text at {path}: no such file or folder (names are builtin, wikitext2 and c4; "
            "a data set of the hub is hub:NAME)"
        )
    return _file_texts(path)


def _text_files(folder: Path) -> Iterator[Path]:
    """Files below a folder that look like text, in order of their names; hidden ones are passed over."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and (_has(path, (*LINES, *TABLES)) or not _is_binary(path)):
            yield path


def _file_texts(path: Path) -> list[str]:
    if _has(path, TABLES):
        return [document(row, f"{path}, row {i}") for i, row in enumerate(rows_of(path))]
    text = _read(path)
    if _has(path, LINES):
        lines = enumerate(text.split("\n"), 1)  # not `splitlines`: JSON may have other line ends inside its strings
        return [_parse_line(line, f"{path}, line {i}") for i, line in lines if line.strip()]
    return [text]


def _has(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(endings)


def _is_binary(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(_SNIFF)
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error


def _read(path: Path) -> str:
    packed = _has(path, (".gz",))
    if not packed and _is_binary(path):
        raise TextError(f"{path} is a binary file: give UTF-8 text")
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if packed else data).decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TextError(f"{path} is no whole gzip file ({error}): get it again") from error
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error


def _parse_line(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TextError(f"{where}: not valid JSON ({error})") from error
    return document(record, where)
