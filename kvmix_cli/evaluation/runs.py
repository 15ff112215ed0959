"""Run folders: one for each row of an evaluation, to which every sample is added as soon as it is done.

<output-dir>/<task>__<model>__<plan>__<8 hex>/
    config.yaml     everything that the numbers depend on; the digits are a hash of it
    samples.jsonl   one record a sample
    metrics.json    the row, once it is complete or has failed; never beside samples that it does not sum up
    rerun.jsonl     samples of a finished run that is being measured anew; they replace the others once all are there

Runs with other settings have other folders, so that nothing finished is ever overwritten by something else.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ..cache.subject import UNQUANTIZED
from ..errors import DocumentError, EvaluationError, OutputError
from ..files import write_text
from ..journal import Journal, check_same_settings, lock, read_records, refuse_constant, release
from ..plan.document import flow, head_comment, read_yaml
from .identity import (
    Config,
    checksum,
    compared,
    identity,
    independent,
    old_name,
    safe_name,
    short_checksum,
    with_samples,
    without_hash,
    without_samples,
)
from .records import SampleRecord, record_form

CONFIG, SAMPLES, METRICS, RERUN = "config.yaml", "samples.jsonl", "metrics.json", "rerun.jsonl"
ORIGIN = ("finished", "machine")
"""Of a row: when and where it was measured."""


@dataclass(frozen=True)
class RunFolders:
    """The run folders of one model.

    Attributes:
        root: the folder that holds them.
        model: the model's name in their names.
        resume: continue what an interrupted run has left, and read what is finished; otherwise measure everything.
        command: the command line, for the head comment of `config.yaml`.
        may_begin: with `resume`, also measure settings under which nothing was measured yet.
        is_shared: with `resume`, other processes measure other rows at the same time. A row whose files are damaged is
            then measured anew, with a warning, since nobody may be there to decide it.
    """

    root: Path
    model: str
    resume: bool = False
    command: str = ""
    may_begin: bool = False
    is_shared: bool = False

    def check(self, task: str, configs: Mapping[str, Config], samples: Sequence[Any]) -> None:
        """Look at the folders of all rows before any of them is measured.

        Args:
            configs: settings of each row, by its plan's name.

        Raises:
            OutputError: if one is a symbolic link, which may lead anywhere.
            EvaluationError: if there is nothing to resume, because everything there was measured with other settings.

        Warns:
            UserWarning: if finished rows are going to be measured anew, or if a row cannot be resumed because another
                plan of its name, or other data, was measured.
        """
        complete = {plan: with_samples(config, samples) for plan, config in configs.items()}
        folders = {plan: self._folder(task, plan, config) for plan, config in complete.items()}
        plans = [plan for plan in folders if plan != UNQUANTIZED and not self.resume]
        finished = [folders[plan] for plan in plans if _has_metrics(folders[plan] / METRICS)]
        if finished:
            more = f" (and {len(finished) - 1} more)" if len(finished) > 1 else ""
            warnings.warn(
                f"{finished[0]}{more} has these results already; they are measured anew, and replaced when the new "
                "ones are complete; --resume reads what is finished",
                stacklevel=2,
            )
        for plan, folder in folders.items() if self.resume and not self.may_begin else ():
            if folder.exists() or not (changed := self._changed(task, plan, complete[plan], samples)):
                continue
            if not self._has_begun(complete[plan]):
                raise EvaluationError(
                    f"{changed}; leave out --resume to measure these settings in folders of their own, "
                    "or choose another --output-dir"
                )
            warnings.warn(f"nothing to resume for {folder}: {changed}; measured from the beginning", stacklevel=2)
            return

    def open(self, task: str, plan: str, config: Config, samples: Sequence[Any]) -> RunFolder:
        """Return the run folder of one row, with the records it already has. Until it is closed it is locked.

        With `resume`, a run of fewer of the same samples gives its records to this one, and stays as it is.

        Raises:
            InUseError: if another process has it open.
            DocumentError: if it is to be resumed but damaged, unless it is shared.
            OutputError: if it cannot be written.
        """
        config = with_samples(config, samples)
        run = RunFolder(self._folder(task, plan, config), task, config, self.command)
        earlier = self._earlier_records(task, plan, config, samples) if self.resume else []
        try:
            run.open(self.resume, earlier)
        except DocumentError as error:
            if not self.is_shared:
                raise
            warnings.warn(f"{error.source} is damaged, so its row is measured anew", stacklevel=2)
            run.open(False, earlier)
        if self.is_shared and (run.folder / METRICS).exists() and not _read_json(run.folder / METRICS):
            warnings.warn(f"{run.folder / METRICS} is damaged, so it is written anew", stacklevel=2)
        return run

    def picture(self, task: str, results: Sequence[Any]) -> Path:
        """Return the path of a picture of a task's results, beside its run folders; other results have another one."""
        return self.root / f"{safe_name(task)}__{safe_name(self.model)}__heatmap__{short_checksum(results)}.png"

    def _folder(self, task: str, plan: str, config: Config) -> Path:
        """Return the folder of a run; with `resume` it may have the name of an older version, without a hash."""
        folder = self.root / f"{self._head(task, plan)}__{identity(config)}"
        before = self.root / old_name(task, self.model, plan)
        if self.resume and not folder.exists() and identity(_read_config(before)) == identity(config):
            folder = before
        if folder.is_symlink():
            raise OutputError(
                f"{folder} is a symbolic link, and results are written to real folders only; "
                "remove it, or choose another --output-dir"
            )
        return folder

    def _earlier_records(self, task: str, plan: str, config: Config, samples: Sequence[Any]) -> list[SampleRecord]:
        """Return the records of the longest run with the same settings but fewer samples, the first ones of these."""
        best: list[SampleRecord] = []
        for folder, count in self._shorter_runs(task, plan, config, samples):
            with suppress(DocumentError):
                records = read_records(folder / SAMPLES, None, record_form(task))
                best = max(best, records[:count], key=len)
        return best

    def _shorter_runs(self, task: str, plan: str, config: Config, samples: Sequence[Any]) -> Iterator[tuple[Path, int]]:
        """Yield run folders, with their numbers of samples, that differ from a row only in having fewer samples."""
        for folder in self._others(task, plan):
            found = _read_config(folder)
            count = found["samples"]["count"] if found else 0
            same = 0 < count < len(samples) and without_samples(found) == without_samples(config)
            if same and checksum(samples[:count]) == found["samples"]["sha256"]:
                yield folder, count

    def _changed(self, task: str, plan: str, config: Config, samples: Sequence[Any]) -> str:
        """Return how a row's settings differ from those of the runs that are there; "" if a run can be resumed."""
        if any(self._shorter_runs(task, plan, config, samples)):
            return ""
        wanted, changed = compared(config), ""
        for other in self._others(task, plan):
            found = compared(_read_config(other))
            names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
            changed = f"{other.name} was measured with another {', '.join(names)}"
        return changed

    def _has_begun(self, config: Config) -> bool:
        """Return whether any row of any task was measured with the settings that all tasks share."""
        wanted = independent(config)
        return any(independent(_read_config(folder)) == wanted for folder in self.root.iterdir() if folder.is_dir())

    def _others(self, task: str, plan: str) -> Iterator[Path]:
        """Yield the run folders of a task and plan, whatever their settings."""
        head, before = self._head(task, plan), old_name(task, self.model, plan)
        for folder in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if folder.name == before or without_hash(folder.name) == head:
                yield folder

    def _head(self, task: str, plan: str) -> str:
        return "__".join(safe_name(part) for part in (task, self.model, plan))


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
            self._rerun = (self.folder / RERUN).exists() if resume else _has_metrics(self.folder / METRICS)
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
        row = _read_json(self.folder / METRICS)
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


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the settings of a run folder; none if there are none, or if they cannot be read."""
    try:
        data = read_yaml(folder / CONFIG).data
        return data if isinstance(data["samples"]["count"], int) and data["samples"]["sha256"] else {}
    except (DocumentError, LookupError, TypeError):
        return {}


def _has_metrics(path: Path) -> bool:
    return "metrics" in _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    """Return an object of a file, empty if it cannot be read."""
    try:
        data = json.loads(path.read_bytes(), parse_constant=refuse_constant)
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write in {folder}: {error.strerror or error}; choose another --output-dir")
