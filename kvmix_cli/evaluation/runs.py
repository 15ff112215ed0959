"""What has been measured stays measured: a folder a row, to which each sample is added as soon as it is done.

<output-dir>/<task>__<model>__<plan>/
    config.yaml     all that the numbers depend on
    samples.jsonl   one record a sample
    metrics.json    the row, once it is complete or has failed; never beside samples that it does not sum up
    .lock           held by the process that is measuring
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from ..errors import EvaluationError, OutputError
from ..files import append_line, write_text
from ..plan.document import flow, head_comment, read_yaml
from .results import Record

FORMAT = "kvmix-run/1"
MAX_NAME = 80
CONFIG, SAMPLES, METRICS, LOCK = "config.yaml", "samples.jsonl", "metrics.json", ".lock"
SECONDS = "seconds"
ORIGIN = ("finished", "machine")
"""Of a row: when and where it was measured."""


@dataclass(frozen=True)
class Runs:
    """The folder of one model's runs.

    Attributes:
        model: its name in the names of folders.
        resume: go on with what an interrupted run has left; otherwise start over.
        command: becomes the head comment of `config.yaml`.
    """

    root: Path
    model: str
    resume: bool = False
    command: str = ""

    def open(self, task: str, plan: str, config: dict[str, Any]) -> Run:
        """The run of one row, with the records it already has; nobody else can open it until it is closed.

        Raises:
            EvaluationError: if another process has it open; or to be resumed, but measured under another config or
                damaged.
            OutputError: if the folder cannot be written.
        """
        run = Run(self.root / f"{safe_name(task)}__{self.model}__{safe_name(plan)}")
        config = {"format": FORMAT, **config}
        run.lock()
        try:
            if self.resume and run.config.exists():
                run.resume(config)
            else:
                run.start(config, self.command)
        except BaseException:
            run.close()
            raise
        return run


class Run:
    """One row on its way. Killing the process at any point loses at most the sample in hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / CONFIG
        self.samples = folder / SAMPLES
        self.metrics = folder / METRICS
        self.records: list[Record] = []
        self.seconds = 0.0
        self._lock = FileLock(folder / LOCK, timeout=0)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def lock(self) -> None:
        """Keep other processes out. Raises EvaluationError if one is in."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise EvaluationError(
                f"another process is measuring into {self.folder}; wait for it, or choose another --output-dir"
            ) from error
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def close(self) -> None:
        """Let others in. The system does the same when a process is killed."""
        self._lock.release()

    def start(self, config: dict[str, Any], command: str = "") -> None:
        """Forget what is there. The config comes last, so that it never stands beside another run's samples."""
        try:
            for path in (self.config, self.metrics):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        write_text(self.samples, "")
        head = head_comment(command)
        body = [f"{key}: {flow(value)}" for key, value in config.items()]
        write_text(self.config, "\n".join(head + body) + "\n")

    def resume(self, config: dict[str, Any]) -> None:
        """Read the records there are. Raises EvaluationError if they do not belong to this config."""
        found = read_yaml(self.config).data
        if changed := _differences(config, found if isinstance(found, dict) else {}):
            raise EvaluationError(
                f"{self.folder} was measured with another {', '.join(changed)}; "
                "leave out --resume to start over, or choose another --output-dir"
            )
        self.records, self.seconds = self._read()

    def append(self, record: Record, seconds: float) -> None:
        """Add a sample's record and the time it took, on the disk when this returns. Raises OutputError."""
        line = json.dumps({**record, SECONDS: round(seconds, 6)}, allow_nan=False)
        self._forget_row()
        append_line(self.samples, line, "--resume goes on with what is there")
        self.records.append(record)
        self.seconds += seconds

    def finish(self, row: dict[str, Any]) -> None:
        """Write the row; if nothing was measured for it now, when and where it was stays. Raises OutputError."""
        write_text(self.metrics, json.dumps({**row, **self._origin()}, indent=2, allow_nan=False) + "\n")

    def _origin(self) -> dict[str, Any]:
        """When and where a row that is there already was measured; nothing if it failed, or if it cannot be read."""
        try:
            row = json.loads(self.metrics.read_bytes(), parse_constant=refuse_constant)
        except (OSError, ValueError, RecursionError):
            return {}
        is_whole = isinstance(row, dict) and "metrics" in row
        return {name: row[name] for name in ORIGIN if name in row} if is_whole else {}

    def _forget_row(self) -> None:
        """A row of fewer samples, such as that of a run that failed, is not one of this run."""
        try:
            self.metrics.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _read(self) -> tuple[list[Record], float]:
        """All whole records and the seconds they took; what a kill has left of a last line is cut off."""
        try:
            data = self.samples.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                os.truncate(self.samples, len(whole))
            return parse_records(whole)
        except OSError as error:
            raise OutputError(f"cannot go on with {self.samples}: {error.strerror}") from error
        except ValueError as error:
            raise EvaluationError(f"{self.samples} is damaged: {error}; leave out --resume to start over") from error


def parse_records(data: bytes) -> tuple[list[Record], float]:
    """The whole lines of `samples.jsonl`, and the seconds they took. Raises ValueError for anything but records."""
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    records = [_parse_record(number, line) for number, line in enumerate(lines, start=1)]
    return records, sum(record.pop(SECONDS, 0.0) for record in records)


def _parse_record(number: int, line: bytes) -> Record:
    try:
        record = json.loads(line, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from error
    if not _is_record(record):
        raise ValueError(f"line {number} is no record of a sample")
    return dict(record)


def _is_record(data: Any) -> bool:
    """Whether it has what every task's record has."""
    if not isinstance(data, dict) or not isinstance(data.get("attended"), dict):
        return False
    seen = data["attended"]
    numbers = (data.get("tokens"), data.get(SECONDS, 0.0), seen.get("total"), seen.get("quantized"))
    return all(isinstance(number, (int, float)) for number in numbers)


def refuse_constant(name: str) -> NoReturn:
    """For `json.loads`, which would take NaN and Infinity for numbers. Raises ValueError."""
    raise ValueError(f"{name} is no number")


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write in {folder}: {error.strerror}; choose another --output-dir")


def safe_name(name: str) -> str:
    """A plan's name as part of a folder's name, still different for different plans."""
    safe = re.sub(r"[^\w.+-]+", "-", name)[:MAX_NAME]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys whose values differ; inside a mapping that both have, the keys in it."""
    names: list[str] = []
    for key in {**one, **other}:
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            names += [f"{key}.{name}" for name in _differences(mine, theirs)]
        elif mine != theirs:
            names.append(key)
    return names
