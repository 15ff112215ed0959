"""What has been measured stays measured: a folder a row, to which each sample is added as soon as it is done.

<output-dir>/<task>__<model>__<plan>/
    config.yaml     all that the numbers depend on
    samples.jsonl   one record a sample
    metrics.json    the row, once it is complete
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EvaluationError, OutputError
from ..files import append_line, flow, read_yaml, write_text
from .base import Record

FORMAT = "kvmix-run/1"
MAX_NAME = 80


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
        """The run of one row, with the records it already has.

        Raises:
            EvaluationError: to be resumed, but measured under another config or damaged.
            OutputError: if the folder cannot be written.
        """
        run = Run(self.root / f"{task}__{self.model}__{safe_name(plan)}")
        config = {"format": FORMAT, **config}
        if self.resume and run.config.exists():
            run.resume(config)
        else:
            run.start(config, self.command)
        return run


class Run:
    """One row on its way. Killing the process at any point loses at most the sample in hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.samples = folder / "samples.jsonl"
        self.metrics = folder / "metrics.json"
        self.records: list[Record] = []

    def start(self, config: dict[str, Any], command: str = "") -> None:
        """Forget what is there. The config comes last, so that it never stands beside another run's samples."""
        try:
            for path in (self.config, self.metrics):
                path.unlink(missing_ok=True)
        except OSError as error:
            reason = f"cannot write in {self.folder}: {error.strerror}"
            raise OutputError(f"{reason}; choose another --output-dir") from error
        write_text(self.samples, "")
        head = [f"# {line}" for line in command.splitlines()]
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
        self.records = self._read()

    def append(self, record: Record) -> None:
        """Add a sample's record, on the disk when this returns. Raises OutputError."""
        append_line(self.samples, json.dumps(record, allow_nan=False), "--resume goes on with what is there")
        self.records.append(record)

    def finish(self, row: dict[str, Any]) -> None:
        """Write the row. Raises OutputError."""
        write_text(self.metrics, json.dumps(row, indent=2, allow_nan=False) + "\n")

    def _read(self) -> list[Record]:
        """All whole records; what a kill has left of a last line is cut off."""
        try:
            data = self.samples.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                os.truncate(self.samples, len(whole))
            return [json.loads(line) for line in whole.splitlines()]
        except OSError as error:
            raise OutputError(f"cannot go on with {self.samples}: {error.strerror}") from error
        except ValueError as error:
            raise EvaluationError(f"{self.samples} is damaged: {error}; leave out --resume to start over") from error


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
