"""The work of one task: rows that are measured, kept, and shared with other ranks or with other processes.

Ranks (`kvmix_cli.ranks`) share the samples of every row: each measures its own, and the leader keeps all in order.
Processes that know nothing of each other share rows: each measures those whose run folder no other process has open.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..cache.subject import UNQUANTIZED, Subject
from ..counting import counted
from ..errors import (
    EvaluationError,
    InUseError,
    KvmixError,
    PlanError,
    PolicyError,
    QuantizationError,
    class_and_sentence,
    is_out_of_memory,
)
from ..extensions import loaded_extensions
from ..models.parts import plan_part
from .base import Context, Sample, Settings, Task
from .machine import machine
from .records import SampleRecord, record_form
from .results import Report, Row
from .runs import RunFolders
from .unfinished import UnfinishedRow, unread_notices

if TYPE_CHECKING:
    from ..models.loading import LoadedModel

Progress = Callable[[str, int], AbstractContextManager[Callable[[], Any]]]
"""Called with a title and a number of steps; gives a function to call after each step."""

TOGETHER = 8
"""Plans whose caches are in memory together where rows are measured side by side, beside the unquantized one."""
SHARE = 4
"""A process that shares rows takes one of so many of those that are left, so that others find some, too."""
FAILURE = b"!"
"""Start of a message that has no record: the reason follows why a sample could not be measured."""

_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that a baseline, which is code of another library, may raise instead of measuring."""


@dataclass(frozen=True)
class TaskWork:
    """One task with everything that is the same for every subject.

    Attributes:
        folders: where records are kept; None keeps them nowhere, as on all ranks but the leader.
    """

    task: Task
    loaded: LoadedModel
    settings: Settings
    samples: Sequence[Sample]
    folders: RunFolders | None
    progress: Progress

    def report(self, subjects: Sequence[Subject]) -> Report:
        """Measure all rows, that of the unquantized cache first.

        Raises:
            KvmixError: if a run folder cannot be used.
            InUseError: if rows are shared and other processes are at some of them. What was measured here is kept; the
                report can be had later.
        """
        is_shared = self.folders is not None and self.folders.is_shared
        rows = self._free_rows(subjects) if is_shared else self._rows(subjects)
        tokens = next((sum(record["tokens"] for record in row.records) for row in rows if row.records), 0)
        described = self.task.describe(self.samples, self.settings)
        return Report(self.task.name, tokens, described, tuple(rows), self.task.notices(self.samples, self.settings))

    def config(self, subject: Subject) -> dict[str, Any]:
        """Return the settings that a subject's numbers depend on, as plain data; times depend on the machine, too."""
        options = json.loads(json.dumps(self.task.options(), default=str))
        return {
            "kvmix": __version__,
            "task": self.task.name,
            "model": self.loaded.info.model_dump(mode="json"),
            "dtype": self.loaded.dtype,
            "device": self.loaded.device.type,
            "attention": self.loaded.model.config._attn_implementation,
            "settings": self.settings.as_json(),
            **({"options": options} if options else {}),
            **({"imported": imported} if (imported := loaded_extensions()) else {}),
            **({"machine": machine(self.loaded.device)} if self.task.timed else {}),
            "plan": subject.plan and {"short": subject.plan.short, "sha256": subject.plan.sha256},
            **({"baseline": dict(subject.baseline.settings)} if subject.baseline else {}),
        }

    def _rows(self, subjects: Sequence[Subject]) -> list[Row]:
        rows: list[Row] = []
        for group in _groups(self.task, subjects):
            with ExitStack() as opened:
                unfinished = [self._begin(subject, opened) for subject in group]
                self._measure(unfinished)
                for row in unfinished:
                    rows.append(self._finish(row, rows[0].records or None if rows else None))
        return rows

    def _free_rows(self, subjects: Sequence[Subject]) -> list[Row]:
        """Measure the rows that no other process is at, some at a time. Raises InUseError if any are left then.

        A row sums up its difference from the unquantized cache. Where another process is at that one, records are kept
        in the row's folder, and it is summed up later, here or there.
        """
        found: dict[str, Row] = {}
        kept: set[str] = set()
        while True:
            has_reference = UNQUANTIZED in found
            left = [each for each in subjects if each.name not in found and (has_reference or each.name not in kept)]
            with ExitStack() as opened:
                group = list(islice(self._begin_free(left, opened), self._share(len(left))))
                if not group or (self.task.timed and len(group) < len(left)):
                    break
                self._measure(group)
                for row in group:
                    reference = found.get(UNQUANTIZED)
                    if reference is None and row.subject.name != UNQUANTIZED:
                        kept.add(row.subject.name)
                    else:
                        found[row.subject.name] = self._finish(row, reference.records or None if reference else None)
        if len(found) < len(subjects):
            rows = counted(len(subjects) - len(found), "row")
            raise InUseError(f"other processes are at {rows} of {self.task.name}; wait for them")
        return [found[subject.name] for subject in subjects]

    def _share(self, left: int) -> int:
        """Return how many rows are measured together by one of several processes."""
        if self.task.timed:
            return left
        return max(1, min(TOGETHER, left // SHARE)) if self.task.side_by_side else 1

    def _begin_free(self, subjects: Sequence[Subject], opened: ExitStack) -> Iterator[UnfinishedRow]:
        for subject in subjects:
            try:
                yield self._begin(subject, opened)
            except InUseError:
                continue

    def _begin(self, subject: Subject, opened: ExitStack) -> UnfinishedRow:
        """Return a subject's row with the records that its run folder already has; `opened` closes the folder."""
        folder, ranks = None, self.loaded.ranks
        if self.folders is not None:
            folder = self.folders.open(self.task.name, subject.name, self.config(subject), self.samples)
            opened.enter_context(folder)
        records = [] if folder is None else list(folder.records)
        numbers = list(range(int(ranks.agree(str(len(records)).encode())), len(self.samples)))
        mine = [number for number in numbers if self._is_mine(number)]
        topic = ranks.topic()
        row = UnfinishedRow(subject, folder, numbers if ranks.leads else mine, iter(()), topic, records)
        with self._failures(row):
            own = self._own_part(subject, opened)
            source = iter(self.task.records(self.loaded, own, [self.samples[each] for each in mine], self.settings))
            is_joined = ranks.leads and len(mine) < len(numbers)
            row.source = self._joined(source, tuple(numbers), topic) if is_joined else source
        row.seconds = 0.0 if folder is None else folder.seconds
        if folder is not None and len(records) > len(self.samples):
            row.error = (
                f"{folder.folder} has {counted(len(records), 'record')} of {counted(len(self.samples), 'sample')}; "
                "leave out --resume to start over"
            )
        return row

    def _own_part(self, subject: Subject, opened: ExitStack) -> Subject:
        """Return the subject as this rank holds it: with its part of the heads, where the ranks share a model."""
        if not self.loaded.ranks.is_sharded or subject.plan is None:
            return subject
        folder = Path(opened.enter_context(TemporaryDirectory(prefix="kvmix-")))
        return replace(subject, plan=plan_part(subject.plan, self.loaded.ranks, folder))

    def _is_mine(self, number: int) -> bool:
        """Return whether this rank measures a sample: times and bytes are all of the leader's process."""
        return self.loaded.ranks.leads if self.task.is_local else self.loaded.ranks.is_mine(number)

    def _joined(
        self, own: Iterator[SampleRecord | None], numbers: Sequence[int], topic: str
    ) -> Iterator[SampleRecord | None]:
        """Yield own records and those of other ranks in order of samples. Raises EvaluationError for theirs."""
        for number in numbers:
            if not self._is_mine(number):
                message = self.loaded.ranks.receive(topic, number)
                if message.startswith(FAILURE):
                    raise EvaluationError(message.removeprefix(FAILURE).decode())
                yield record_form(self.task.name).validate_json(message)
                continue
            for record in own:
                yield record
                if record is not None:
                    break
            else:
                return

    def _measure(self, rows: Sequence[UnfinishedRow]) -> None:
        """Measure all samples, each of them in every row before the next."""
        name = rows[0].subject.name if len(rows) == 1 else f"{len(rows)} rows in turns"
        with self.progress(f"{self.task.name}: {name}", len(rows) * len(self.samples)) as advance:
            for number in range(len(self.samples)):
                waiting = list(rows)
                while waiting:
                    waiting = [row for row in waiting if not self._is_measured(row, number, advance)]

    def _is_measured(self, row: UnfinishedRow, number: int, advance: Callable[[], Any]) -> bool:
        """Measure a row on, and return whether that is all of a sample."""
        if row.lacks(number):
            found = None
            with self._failures(row):
                found = row.measure_part()
            self._send(row, number, found)
        if row.lacks(number):
            return False
        advance()
        return True

    def _send(self, row: UnfinishedRow, number: int, found: tuple[SampleRecord, float] | None) -> None:
        """Send the leader a record, or the reason why there is none."""
        ranks = self.loaded.ranks
        if ranks.leads or ranks.is_sharded:
            return
        if row.error is not None:
            ranks.send(row.topic, number, FAILURE + row.error.encode())
        elif found is not None:
            record, seconds = found
            ranks.send(row.topic, number, json.dumps({**record, "seconds": seconds}).encode())

    def _finish(self, unfinished: UnfinishedRow, reference: Sequence[SampleRecord] | None) -> Row:
        """Return a subject's row, one with an error if it could not be measured, and keep it in its folder."""
        if self.loaded.ranks.world > 1:
            self._agree(unfinished)
        row = Row(self.task.name, unfinished.subject.name, *unfinished.subject.bits)
        if unfinished.error is None:
            with self._failures(unfinished):
                row = self._summarised(row, unfinished, reference)
        row = replace(row, error=unfinished.error)
        if unfinished.folder is not None:
            unfinished.folder.finish({**row.as_json(), **self._about(row)})
        return row

    def _agree(self, row: UnfinishedRow) -> None:
        """Take all records of a row from the leader, so that every rank comes to the same results."""
        told = self.loaded.ranks.agree(json.dumps([row.records, row.seconds, row.error]).encode())
        row.records, row.seconds, row.error = json.loads(told)

    def _summarised(self, row: Row, unfinished: UnfinishedRow, reference: Sequence[SampleRecord] | None) -> Row:
        subject, records = unfinished.subject, unfinished.records
        metrics = self.task.summarise(records, reference, self.settings.seed)
        seen = sum(record["attended"]["total"] for record in records)
        quantized = sum(record["attended"]["quantized"] for record in records)
        row = replace(row, metrics=metrics, records=tuple(records), seconds=unfinished.seconds)
        row = replace(row, quantized_share=quantized / seen if seen else 0.0)
        unread = unread_notices(subject, row, self.task.longer(self.settings))
        return replace(row, warnings=(*unread, *self.task.warnings(subject, metrics)))

    @contextmanager
    def _failures(self, row: UnfinishedRow) -> Iterator[None]:
        """Turn errors that are an outcome of measuring into the row's error; others are raised."""
        try:
            yield
        except (PlanError, PolicyError, QuantizationError, EvaluationError) as error:
            row.error = str(error)
        except KvmixError:
            raise
        except _FAILURES as error:
            if is_out_of_memory(error):
                if self.loaded.ranks.is_sharded:
                    raise  # the other ranks wait for this one inside the model
                fewer = ", or fewer plans at a time" if self.task.side_by_side else ""
                row.error = _shortage(self.task.context(self.settings), str(self.loaded.device)) + fewer
            elif row.subject.baseline is not None:
                row.error = class_and_sentence(error)
            else:
                raise

    def _about(self, row: Row) -> dict[str, Any]:
        """Return the facts that a reader of the row needs who has not seen the task."""
        return {
            "tokens": sum(record["tokens"] for record in row.records),
            "description": self.task.describe(self.samples, self.settings),
            "metric_info": {metric.name: asdict(metric) for metric in self.task.metrics},
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(self.loaded.device),
        }


def _groups(task: Task, subjects: Sequence[Subject]) -> Iterator[Sequence[Subject]]:
    """Yield the subjects that are measured together: slow moments come to all of them, or their parts are compared."""
    size = len(subjects) if task.timed else TOGETHER if task.side_by_side else 1
    first = size + 1 if task.side_by_side else size  # the unquantized cache and as many others
    yield subjects[:first]
    for start in range(first, len(subjects), size):
        yield subjects[start : start + size]


def _shortage(context: Context | None, device: str) -> str:
    if context is None:
        return f"out of memory on {device}; free some and go on with --resume"
    return f"out of memory at {context.tokens} tokens on {device}; use a smaller {context.option}"
