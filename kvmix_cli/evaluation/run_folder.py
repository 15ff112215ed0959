"""Run folder: the files of one row of an evaluation, to which every sample is added as soon as it is done.

<output-dir>/<task>__<model>__<plan>__<8 hex>/
    config.yaml     everything that the numbers depend on; the digits are a hash of it
    samples.jsonl   one record a sample
    metrics.json    the row, once it is complete or has failed; never beside samples that it does not sum up
    rerun.jsonl     samples of a finished run that is being measured anew; they replace the others once all are there
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import DocumentError, OutputError
from ..files import write_text
from ..journal import Journal, check_same_settings, lock, refuse_constant, release
from ..plan.document.strict_yaml import flow, head_comment, read_yaml
from .identity import Config, compared
from .records import SampleRecord, record_form

CONFIG, SAMPLES, METRICS, RERUN = "config.yaml", "samples.jsonl", "metrics.json", "rerun.jsonl"
ORIGIN = ("finished", "machine")
"""Of a row: when and where it was measured."""


@dataclass
class RunFolder:
    """One row on its way. Killing the process at any point loses at most the sample in hand.

    Attributes:
        records: finished records, in order.
        seconds: time that they took, in all processes.
    """

    folder: Path
    task: str
    config: Config
    command: str = ""
    records: list[SampleRecord] = field(default_factory=list)
    seconds: float = 0.0
    _rerun: bool = False
    _measured: bool = False

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def open(self, resume: bool = False, earlier: Sequence[SampleRecord] = ()) -> None:
        """Lock the folder, and start over or continue what is there.

        Args:
            resume: continue, if a run with the same settings is there.
            earlier: records to begin with if there is none.

        Raises:
            InUseError: if another process has it open.
            DocumentError: if what is there has other settings or is damaged.
            OutputError: if it cannot be written.
        """
        self._lock = lock(self.folder / CONFIG)
        try:
            resume = resume and (self.folder / CONFIG).exists()
            if resume:
                path = self.folder / CONFIG
                check_same_settings(path, compared(_settings_to_resume(path)), compared(self.config))
            self._rerun = (self.folder / RERUN).exists() if resume else has_metrics(self.folder / METRICS)
            if not resume and not self._rerun:
                self._remove(CONFIG)
                self._remove(METRICS)
            name = RERUN if self._rerun else SAMPLES
            self._journal = Journal(self.folder / name, None, record_form(self.task), resume=resume)
        except BaseException:
            release(self._lock)
            raise
        try:
            for record in [] if resume or self._rerun else earlier:
                self._journal.append(record)
            if not resume and not self._rerun:
                self._write_config()  # last, so that it never stands beside another run's samples
        except BaseException:
            self.close()
            raise
        self._read_journal()

    def close(self) -> None:
        """Let other processes in. The system does the same when a process is killed."""
        try:
            self._journal.close()
        finally:
            release(self._lock)

    def append(self, record: SampleRecord, seconds: float) -> None:
        """Add a sample's record and the time it took. Raises OutputError."""
        if not self._measured and not self._rerun:
            self._remove(METRICS)  # it sums up fewer samples, or says why there were no more
        self._measured = True
        kept = record.copy()
        kept["seconds"] = seconds
        self._journal.append(kept)
        self.records.append(record)
        self.seconds += seconds

    def finish(self, row: Mapping[str, Any]) -> None:
        """Write the row. A row that was only read again keeps the time and place of its measurement.

        A finished run that was measured anew is replaced now; if the new row has failed, the finished one stays.

        Raises:
            OutputError: if it cannot be written; the samples are kept.
        """
        if self._rerun and "error" in row:
            return
        origin = {} if self._measured or self._rerun else self._origin()
        try:
            if self._rerun:
                self._replace_finished()
            write_text(self.folder / METRICS, json.dumps({**row, **origin}, indent=2, allow_nan=False) + "\n")
        except OutputError as error:
            raise OutputError(f"{error}; all samples are kept: continue with --resume") from error

    def _replace_finished(self) -> None:
        self._journal.close()
        self._remove(METRICS)
        try:
            (self.folder / RERUN).replace(self.folder / SAMPLES)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._write_config()

    def _read_journal(self) -> None:
        """Take the records, without the seconds that files keep beside them."""
        for record in self._journal.records:
            read = record.copy()
            self.seconds += read.pop("seconds", 0.0)
            self.records.append(read)

    def _write_config(self) -> None:
        lines = head_comment(self.command) + [f"{key}: {flow(value)}" for key, value in self.config.items()]
        write_text(self.folder / CONFIG, "\n".join(lines) + "\n")

    def _origin(self) -> dict[str, Any]:
        row = read_object(self.folder / METRICS)
        return {name: row[name] for name in ORIGIN if name in row} if "metrics" in row else {}

    def _remove(self, name: str) -> None:
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error


def _settings_to_resume(path: Path) -> dict[str, Any]:
    """Return the settings of a run folder. Raises DocumentError if the file is damaged, and says what to do."""
    try:
        document = read_yaml(path)
        if not isinstance(document.data, dict):
            raise DocumentError(str(path), ["it has no settings"])
    except DocumentError as error:
        raise DocumentError(error.source, [*error.faults, "leave out --resume to start over"]) from error
    return document.data


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings of a run folder; none if there are none, or if they cannot be read."""
    try:
        data = read_yaml(folder / CONFIG).data
        return data if isinstance(data["samples"]["count"], int) and data["samples"]["sha256"] else {}
    except (DocumentError, LookupError, TypeError):
        return {}


def has_metrics(path: Path) -> bool:
    """Return whether a file has the metrics of a row that was measured to its end."""
    return "metrics" in read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """Return an object of a file, empty if it cannot be read."""
    try:
        data = json.loads(path.read_bytes(), parse_constant=refuse_constant)
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write in {folder}: {error.strerror or error}; choose another --output-dir")
