"""The resume file: JSON lines, one of settings and then one for every finished sample.

A run that is interrupted loses the sample in hand. Continuing under other settings would mix two measurements, so
they must be equal. A last line that was cut off while it was written is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ..errors import DocumentError
from ..files import append_line, write_text
from .base import Measured

FORMAT = "kvmix-journal/2"

Sample = dict[str, Measured]
"""What one sample gave, by score."""
_FORM = TypeAdapter(Sample)


class Journal:
    """Finished samples of one run, on disk as soon as they are finished; only in memory without a path.

    Attributes:
        samples: in order.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Begin a journal, or with `resume` go on with the one that is there.

        Raises:
            DocumentError: if the one that is there is damaged or has other settings.
            OutputError: if it cannot be written.
        """
        header = json.loads(json.dumps({"format": FORMAT, **settings}))
        self._path = path
        self.samples = _read(path, header) if path is not None and resume and path.exists() else []
        if path is not None:
            lines = [json.dumps(header), *map(_line, self.samples)]
            write_text(path, "\n".join(lines) + "\n")

    def append(self, sample: Sample) -> None:
        """Add a finished sample. Raises OutputError."""
        self.samples.append(sample)
        if self._path is None:
            return
        append_line(self._path, _line(sample), "make room, then go on with --resume")


def _read(path: Path, header: dict[str, Any]) -> list[Sample]:
    try:
        first, *lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(path, "it cannot be read") from error
    _require_same(path, first, header)
    complete = lines[:-1]  # what follows the last line end was cut off, or is empty
    try:
        samples = [_FORM.validate_json(line) for line in complete]
    except ValueError as error:
        raise _unusable(path, "it is damaged") from error
    if any(list(sample) != header["scores"] for sample in samples):
        raise _unusable(path, "it is damaged")
    return samples


def _line(sample: Sample) -> str:
    return _FORM.dump_json(sample).decode()


def _require_same(path: Path, first: str, header: dict[str, Any]) -> None:
    try:
        found = json.loads(first)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise _unusable(path, "it is no kvmix journal")
    differences = [
        f"{name} was {found.get(name)!r} and is now {header.get(name)!r}"
        for name in {**header, **found}
        if found.get(name) != header.get(name)
    ]
    if differences:
        raise _unusable(path, ", ".join(differences))


def _unusable(path: Path, reason: str) -> DocumentError:
    return DocumentError(str(path), [f"this run cannot go on from it: {reason}; drop --resume to start anew"])
