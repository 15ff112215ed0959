"""Journals: JSON-lines files that keep what a long run has finished, so that an interrupted run can go on.

One rule of resuming for everything that is measured: a run goes on only from records that were measured under equal
settings, and continues after the last whole record. A last line without its end was cut off by a kill and is dropped.
While a journal is open nobody else can open it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, NoReturn, TypeVar

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from .errors import DocumentError, InUseError, OutputError
from .files import write_text
from .plan.document.strict_yaml import reason

RecordT = TypeVar("RecordT")

SYNC_SECONDS = 5.0
"""Seconds between two fsyncs. A kill loses nothing that was written; a power failure loses at most these seconds."""
HASH_DIGITS = 8
"""Digits of hashes in names and identities."""


class Journal(Generic[RecordT]):
    """Finished records of one run, in a file as soon as they are finished; in memory only without a path.

        with Journal(path, settings, TypeAdapter(MyRecord), resume=True) as journal:
            for sample in samples[len(journal.records):]:
                journal.append(measure(sample))

    Attributes:
        path: the file; None for a journal in memory.
        records: all finished records, in order.
    """

    def __init__(
        self, path: Path | None, settings: Mapping[str, Any] | None, form: TypeAdapter[RecordT], *, resume: bool
    ) -> None:
        """Begin a journal, or with `resume` go on with the one that is there.

        Args:
            path: the file. Its lock is the hidden file beside it.
            settings: everything that the records depend on, as plain data: the file's first line. None for a file
                without such a line, whose settings the caller keeps and compares.
            form: schema of a record.
            resume: go on with the records of the file, if there is one; otherwise start over.

        Raises:
            InUseError: if another process has it open.
            DocumentError: if the file is damaged or has other settings.
            OutputError: if it cannot be written.
        """
        self.path = path
        self.records: list[RecordT] = []
        self._form = form
        self._file: BinaryIO | None = None
        self._synced = time.monotonic()
        if path is None:
            return
        self._lock = lock(path)
        try:
            self._open(path, settings, resume=resume)
        except BaseException:
            release(self._lock)
            raise

    def _open(self, path: Path, settings: Mapping[str, Any] | None, *, resume: bool) -> None:
        head = None if settings is None else plain(settings)
        if resume and path.exists():
            self.records = read_records(path, head, self._form)
        lines = [] if head is None else [json.dumps(head)]
        lines += [self._line(record) for record in self.records]
        write_text(path, "".join(line + "\n" for line in lines))
        self._file = path.open("ab")

    def append(self, record: RecordT) -> None:
        """Add a finished record. Raises OutputError."""
        self.records.append(record)
        if self._file is None:
            return
        try:
            self._file.write(self._line(record).encode() + b"\n")
            self._file.flush()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise self._full(error) from error

    def close(self) -> None:
        """Write everything to the disk and let others open the journal. Raises OutputError."""
        if self._file is None:
            return
        try:
            self._sync()
        except OSError as error:
            raise self._full(error) from error
        finally:
            with suppress(OSError):  # a record that could not be written is still in the buffer
                self._file.close()
            self._file = None
            release(self._lock)

    def remove(self) -> None:
        """Close the journal and delete its file, once its records are kept elsewhere."""
        self.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _full(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write {self.path}: {error.strerror or error}; make room, then continue with --resume"
        )

    def _line(self, record: RecordT) -> str:
        return self._form.dump_json(record).decode()

    def __enter__(self) -> Journal[RecordT]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_records(path: Path, head: Mapping[str, Any] | None, form: TypeAdapter[RecordT]) -> list[RecordT]:
    """Return the whole records of a journal.

    Args:
        head: the settings that its first line must have; None for a file without such a line.

    Raises:
        DocumentError: if it cannot be read, is damaged, or has other settings.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unusable(path, f"it cannot be read: {error.strerror}") from error
    lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
    if head is not None:
        check_same_settings(path, _parse_head(path, lines[0] if lines else b""), head)
        lines = lines[1:]
    records = []
    for number, line in enumerate(lines, start=1 if head is None else 2):
        try:
            records.append(form.validate_json(line))
        except ValueError as error:
            raise _unusable(path, f"line {number} is damaged ({reason(error)})") from error
    return records


def check_same_settings(path: Path, found: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise DocumentError, with every difference, unless two sets of settings are equal as plain data."""
    wanted = plain(now)
    changed = [
        f"{name} was {_shown(found.get(name))} and is now {_shown(wanted.get(name))}"
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    ]
    if changed:
        raise _unusable(path, ", ".join(changed))


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON would give them back."""
    data: dict[str, Any] = json.loads(json.dumps(settings))
    return data


def canonical(data: Any) -> str:
    """Return plain data as text that is the same for the same data; keys of any kind are text in it."""
    return json.dumps(_with_text_keys(data), sort_keys=True, default=str)


def short_hash(data: Any) -> str:
    """Return some digits that tell plain data from other data, for names and identities."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()[:HASH_DIGITS]


def _with_text_keys(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _with_text_keys(value) for key, value in data.items()}
    return [_with_text_keys(each) for each in data] if isinstance(data, (list, tuple)) else data


def lock(path: Path) -> FileLock:
    """Return the held lock of a file that this process is going to write; `release` gives it back.

    Raises:
        InUseError: if another process holds it.
        OutputError: if the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        held.acquire()
    except Timeout as error:
        raise InUseError(f"another process is writing {path}; wait for it, or write to another place") from error
    except OSError as error:
        raise OutputError(f"cannot write in {path.parent}: {error.strerror or error}") from error
    return held


def release(held: FileLock) -> None:
    """Give a lock back and remove its file; the system does the first when a process is killed."""
    Path(held.lock_file).unlink(missing_ok=True)
    held.release()


def refuse_constant(name: str) -> NoReturn:
    """Raise ValueError: for `json.loads`, which would otherwise accept NaN and Infinity as numbers."""
    raise ValueError(f"{name} is no number")


def _parse_head(path: Path, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _unusable(path, "its first line is damaged") from error
    if not isinstance(found, dict):
        raise _unusable(path, "it is no kvmix journal")
    return found


def _unusable(path: Path, why: str) -> DocumentError:
    return DocumentError(str(path), [f"cannot resume from this file: {why}; leave out --resume to start over"])


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
