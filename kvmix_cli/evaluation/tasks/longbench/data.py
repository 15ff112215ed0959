"""LongBench's records, from `data.zip` of the hub or from JSONL files of one's own, checked line by line."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ....errors import EvaluationError, did_you_mean, first_sentence
from .datasets import Dataset

REPOSITORY, ARCHIVE = "THUDM/LongBench", "data.zip"
_ADVICE = "download data.zip from https://huggingface.co/datasets/THUDM/LongBench and give its folder with --data-dir"
_SHOWN = 3
_UNREADABLE = (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""What reading a file, or a member of a damaged or encrypted archive, may raise."""


@dataclass(frozen=True)
class Entry:
    """One question about one context, in LongBench's own terms.

    Attributes:
        answers: reference answers, at least one.
        classes: of a classification, all there are.
        length: of the text in words (Chinese: characters), by which LongBench-E is binned.
        line: where it stands in its file, from 1.
    """

    input: str
    context: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    length: int
    line: int


@dataclass(frozen=True)
class Entries:
    """What a file holds.

    Attributes:
        faults: of lines that hold no record, each with its number.
    """

    where: str
    found: tuple[Entry, ...]
    faults: tuple[str, ...]

    @property
    def notice(self) -> str | None:
        """What to say about lines that were skipped."""
        if not self.faults:
            return None
        total = len(self.found) + len(self.faults)
        some = "; ".join(self.faults[:_SHOWN]) + ("; ..." if len(self.faults) > _SHOWN else "")
        lines = "line" if len(self.faults) == 1 else "lines"
        return f"{self.where}: skipped {len(self.faults)} malformed {lines} of {total} ({some})"


class Files(Protocol):
    """Named files, in a folder or an archive."""

    @property
    def path(self) -> Path: ...

    def names(self) -> list[str]: ...

    def lines(self, name: str) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class Folder:
    """A folder of JSONL files."""

    path: Path

    def names(self) -> list[str]:
        return sorted(file.name for file in self.path.glob("*.jsonl"))

    def lines(self, name: str) -> Iterator[bytes]:
        with (self.path / name).open("rb") as file:
            yield from file


@dataclass(frozen=True)
class Archive:
    """A zip file of JSONL files, whatever the folders in it."""

    path: Path

    def names(self) -> list[str]:
        return sorted(name for name in self._members() if name.endswith(".jsonl"))

    def lines(self, name: str) -> Iterator[bytes]:
        with zipfile.ZipFile(self.path) as archive, archive.open(self._members()[name]) as file:
            yield from file

    def _members(self) -> dict[str, str]:
        with zipfile.ZipFile(self.path) as archive:
            return {PurePosixPath(member).name: member for member in archive.namelist()}


def find(data_dir: Path | None) -> Files:
    """Where the records are.

    Args:
        data_dir: a folder that holds the JSONL files, `data/` with them, or `data.zip`; or such a zip file itself.
            None is the hub, or what was downloaded from it before.

    Raises:
        EvaluationError: if there are none.
    """
    if data_dir is None:
        return Archive(_download())
    path = data_dir.expanduser()
    if zipfile.is_zipfile(path):
        return Archive(path)
    for folder in (path, path / "data"):
        if folder.is_dir() and any(folder.glob("*.jsonl")):
            return Folder(folder)
    if (path / ARCHIVE).is_file():
        return Archive(path / ARCHIVE)
    if not path.is_dir():
        raise EvaluationError(f"{path} is no folder and no zip file: {_ADVICE}")
    raise EvaluationError(f"{path} has no *.jsonl, no data/*.jsonl and no {ARCHIVE}: {_ADVICE}")


def read(files: Files, name: str, dataset: Dataset, strict: bool = False) -> Entries:
    """The records of a file, such as `qasper.jsonl`.

    Args:
        strict: a malformed line is an error, and not skipped.

    Raises:
        EvaluationError: if there is no such file or no record in it, or it cannot be read.
    """
    where = f"{files.path.name}/{name}"
    found, faults = [], []
    try:
        names = files.names()
        if name not in names:
            there = ", ".join(names) or "no other"
            raise EvaluationError(f"{files.path} has no {name}{did_you_mean(name, names)}; it has {there}")
        for number, line in enumerate(files.lines(name), 1):  # only a line feed ends one, as in JSONL
            if not line.strip():
                continue
            try:
                found.append(_entry(line, number, dataset))
            except ValueError as fault:
                faults.append(f"line {number}: {fault}")
                if strict:
                    raise EvaluationError(
                        f"{where}, {faults[-1]}; mend it, or leave out --strict to skip it"
                    ) from fault
    except _UNREADABLE as error:
        raise EvaluationError(f"cannot read {name} of {files.path}: {first_sentence(error)}") from error
    entries = Entries(where, tuple(found), tuple(faults))
    if not found:
        raise EvaluationError(f"no record in {files.path}/{name}" + (f": {entries.notice}" if faults else ""))
    return entries


def _download() -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(REPOSITORY, ARCHIVE, repo_type="dataset"))
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        raise EvaluationError(f"cannot fetch LongBench from the hub: {first_sentence(error)}; {_ADVICE}") from error


def _entry(line: bytes, number: int, dataset: Dataset) -> Entry:
    """A record. Raises ValueError that says what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8-sig").strip())
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({first_sentence(error)})") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    answers = _texts(record, "answers")
    if not answers:
        raise ValueError("no answers")
    if dataset.answer and not all(re.search(dataset.answer, answer) for answer in answers):
        raise ValueError(f"answers of {dataset.name} must look like '{dataset.answer}'")
    length = record.get("length")
    if not isinstance(length, int) or isinstance(length, bool) or length < 0:
        raise ValueError("'length' must be a number of words")
    classes = _texts(record, "all_classes") if dataset.metric == "classification_score" else ()
    return Entry(_text(record, "input"), _text(record, "context"), answers, classes, length, number)


def _texts(record: dict[str, Any], field: str) -> tuple[str, ...]:
    values = record.get(field)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"'{field}' must be a list of texts")
    return tuple(_encodable(value, field) for value in values)


def _text(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise ValueError(f"'{field}' must be a text")
    return _encodable(value, field)


def _encodable(text: str, field: str) -> str:
    """JSON can spell half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"'{field}' holds half a character") from error
    return text
