"""LongBench's records, from `data.zip` of the hub or from JSONL files of one's own, checked line by line."""

from __future__ import annotations

import difflib
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ....errors import EvaluationError, first_sentence
from .datasets import LongBenchDataset

REPOSITORY, ARCHIVE = "THUDM/LongBench", "data.zip"
_ADVICE = "download data.zip from https://huggingface.co/datasets/THUDM/LongBench and give its folder with --data-dir"
_SHOWN = 3
"""Most malformed lines, and most missing files with their near names, that a message names."""
_UNREADABLE = (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""Errors of reading a file, or a member of a damaged or encrypted archive."""


@dataclass(frozen=True)
class LongBenchQuestion:
    """One question about one context, in LongBench's own terms.

    Attributes:
        answers: reference answers, at least one.
        classes: all classes, where the data set is a classification.
        length: of the text in words (Chinese: characters), by which LongBench-E is binned.
        line: number of its line in its file, from 1.
    """

    input: str
    context: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    length: int
    line: int


@dataclass(frozen=True)
class QuestionFile:
    """The questions of one file.

    Attributes:
        where: the file, as messages name it.
        faults: one for each line that holds no record, with its number.
    """

    where: str
    questions: tuple[LongBenchQuestion, ...]
    faults: tuple[str, ...]

    @property
    def notice(self) -> str | None:
        """Return a line about the lines that were skipped, None if none was."""
        if not self.faults:
            return None
        total = len(self.questions) + len(self.faults)
        some = "; ".join(self.faults[:_SHOWN]) + ("; ..." if len(self.faults) > _SHOWN else "")
        lines = "line" if len(self.faults) == 1 else "lines"
        return f"{self.where}: skipped {len(self.faults)} malformed {lines} of {total} ({some})"


class DataSource(Protocol):
    """Named files, in a folder or an archive."""

    @property
    def path(self) -> Path: ...

    def names(self) -> list[str]:
        """Return the names of all files."""
        ...

    def lines(self, name: str) -> Iterator[bytes]:
        """Yield the lines of a file."""
        ...


@dataclass(frozen=True)
class DataFolder:
    """A folder of JSONL files."""

    path: Path

    def names(self) -> list[str]:
        """Return the names of all files."""
        return _file_names(self.path)

    def lines(self, name: str) -> Iterator[bytes]:
        """Yield the lines of a file."""
        with (self.path / name).open("rb") as file:
            yield from file


@dataclass(frozen=True)
class DataArchive:
    """A zip file of JSONL files, in any folders."""

    path: Path

    def names(self) -> list[str]:
        """Return the names of all files, without their folders."""
        return sorted(name for name in self._members() if name)

    def lines(self, name: str) -> Iterator[bytes]:
        """Yield the lines of a file."""
        with zipfile.ZipFile(self.path) as archive, archive.open(self._members()[name]) as file:
            yield from file

    def _members(self) -> dict[str, str]:
        with zipfile.ZipFile(self.path) as archive:
            return {PurePosixPath(member).name: member for member in archive.namelist() if not member.endswith("/")}


def open_source(data_dir: Path | None) -> DataSource:
    """Return the place of the records.

    Args:
        data_dir: a folder that holds the JSONL files, `data/` with them, or `data.zip`; or such a zip file itself.
            None is the hub, or what was downloaded from it before.

    Raises:
        EvaluationError: if there are none.
    """
    if data_dir is None:
        return DataArchive(_download())
    path = data_dir.expanduser()
    if zipfile.is_zipfile(path):
        return DataArchive(path)
    for folder in (path, path / "data"):
        if _has_records(folder):
            return DataFolder(folder)
    if (path / ARCHIVE).is_file():
        return DataArchive(path / ARCHIVE)
    if not path.is_dir():
        raise EvaluationError(f"{path} is no folder and no zip file: {_ADVICE}")
    raise EvaluationError(f"{path} has no *.jsonl, no data/*.jsonl and no {ARCHIVE}{_contents(path)}: {_ADVICE}")


def check_names(source: DataSource, names: Sequence[str]) -> None:
    """Raise EvaluationError unless a source has files of these names; it lists all that are missing, and near names."""
    try:
        there = source.names()
    except _UNREADABLE as error:
        raise EvaluationError(f"cannot read {source.path}: {first_sentence(error)}") from error
    missing = [name for name in names if name not in there]
    if not missing:
        return
    some = ", ".join(f"{name}{_near(name, there)}" for name in missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN} more of the files that it needs" if len(missing) > _SHOWN else ""
    listed = ", ".join(name for name in there if name.endswith(".jsonl")) or "no *.jsonl"
    raise EvaluationError(
        f"{source.path} has no {some}{more}; it has {listed}; "
        "a file is named after its data set: rename it, or choose data sets with --task longbench:NAME,..."
    )


def read_questions(source: DataSource, name: str, dataset: LongBenchDataset, strict: bool = False) -> QuestionFile:
    """Return the questions of a file, such as `qasper.jsonl`.

    Args:
        strict: a malformed line is an error, and not skipped.

    Raises:
        EvaluationError: if there is no such file or no record in it, or it cannot be read.
    """
    check_names(source, [name])
    where = f"{source.path.name}/{name}"
    questions, faults = [], []
    try:
        for number, line in enumerate(source.lines(name), 1):  # only a line feed ends one, as in JSONL
            if not line.strip():
                continue
            try:
                questions.append(_question(line, number, dataset))
            except ValueError as fault:
                faults.append(f"line {number}: {fault}")
                if strict:
                    raise EvaluationError(
                        f"{where}, {faults[-1]}; correct it, or leave out --strict to skip it"
                    ) from fault
    except _UNREADABLE as error:
        raise EvaluationError(f"cannot read {name} of {source.path}: {first_sentence(error)}") from error
    found = QuestionFile(where, tuple(questions), tuple(faults))
    if not questions:
        raise EvaluationError(f"no record in {source.path}/{name}" + (f": {found.notice}" if faults else ""))
    return found


def _download() -> Path:
    from huggingface_hub import hf_hub_download

    from ....network import HUB_ERRORS

    try:
        return Path(hf_hub_download(REPOSITORY, ARCHIVE, repo_type="dataset"))
    except HUB_ERRORS as error:
        raise EvaluationError(f"cannot fetch LongBench from the hub: {first_sentence(error)}; {_ADVICE}") from error


def _file_names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.is_file())


def _has_records(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*.jsonl"))


def _contents(folder: Path) -> str:
    """Return what a folder has instead of records: a folder with some in it, or its files."""
    inside = [child.name for child in sorted(folder.iterdir()) if _has_records(child)]
    if inside:
        return f" (did you mean '{folder / inside[0]}'?)"
    names = _file_names(folder)
    return f", but {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}" if names else ""


def _near(name: str, there: Sequence[str]) -> str:
    """Return a question about the nearest of the names that are there, empty if none is near."""
    stem = name.partition(".")[0]
    stems = {other.partition(".")[0]: other for other in there}
    near = [other for other in there if stem.lower() in other.lower()]
    near += [stems[other] for other in difflib.get_close_matches(stem, stems, n=1)]
    return f" (did you mean '{near[0]}'?)" if near else ""


def _question(line: bytes, number: int, dataset: LongBenchDataset) -> LongBenchQuestion:
    """Return the record of a line. Raises ValueError with the fault if it holds none."""
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
    return LongBenchQuestion(_text(record, "input"), _text(record, "context"), answers, classes, length, number)


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
    """Return a text. Raises ValueError for half a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"'{field}' holds half a character") from error
    return text
