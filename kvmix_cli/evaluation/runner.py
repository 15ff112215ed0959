"""Running a task: the unquantized cache first, then every subject, on the same samples."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from kvmix_kernels.layout import FULL_PRECISION_BITS

from .._version import __version__
from ..cache.subject import Subject
from ..errors import EvaluationError, KvmixError, PlanError, QuantizationError, class_and_sentence, is_out_of_memory
from ..extensions import loaded_extensions
from .base import Context, Sample, Settings, Task
from .machine import machine
from .records import SampleRecord
from .results import Report, Row
from .runs import RunFolder, RunFolders

if TYPE_CHECKING:
    from ..models.loading import LoadedModel

Progress = Callable[[str, int], AbstractContextManager[Callable[[], Any]]]
"""Called with a title and a number of steps; gives a function to call after each step."""

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


TOGETHER = 8
"""Plans whose caches are in memory together where rows are measured side by side, beside the unquantized one."""


@contextmanager
def no_progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show no progress."""
    yield lambda: None


def run_task(
    task: Task,
    loaded: LoadedModel,
    subjects: Sequence[Subject],
    settings: Settings,
    folders: RunFolders | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Measure the unquantized cache and then each subject; for some tasks several of them together, sample by sample.

    A subject that cannot be measured (its plan does not fit, its numbers cannot be quantized, no memory is left) gets a
    row with an error; the others are measured all the same.

    Args:
        folders: where records are kept; None keeps them nowhere.

    Raises:
        KvmixError: if there is nothing to measure on, or a run folder cannot be used.
    """
    settings.check()
    task.check_context(settings, loaded.max_length)
    if settings.prefill_chunk is not None:
        loaded = replace(loaded, prefill_chunk=settings.prefill_chunk)
    samples = task.samples(loaded, settings)
    loaded.check_ids(getattr(sample, "ids", ()) for sample in samples)
    work = _Work(task, loaded, settings, samples, folders, progress)
    all_subjects = (Subject(), *subjects)
    if folders is not None:
        folders.check(task.name, {subject.name: work.config(subject) for subject in all_subjects}, work.samples)
    rows: list[Row] = []
    for group in _groups(task, all_subjects):
        with ExitStack() as opened:
            unfinished = [work.begin(subject, opened) for subject in group]
            work.measure(unfinished)
            for row in unfinished:
                rows.append(work.finish(row, rows[0].records or None if rows else None))
    tokens = next((sum(record["tokens"] for record in row.records) for row in rows if row.records), 0)
    described = task.describe(work.samples, settings)
    return Report(task.name, tokens, described, tuple(rows), task.notices(work.samples, settings))


def _groups(task: Task, subjects: Sequence[Subject]) -> Iterator[Sequence[Subject]]:
    """Yield the subjects that are measured together: slow moments come to all of them, or their parts are compared."""
    size = len(subjects) if task.timed else TOGETHER if task.side_by_side else 1
    first = size + 1 if task.side_by_side else size  # the unquantized cache and as many others
    yield subjects[:first]
    for start in range(first, len(subjects), size):
        yield subjects[start : start + size]


@dataclass
class _UnfinishedRow:
    """One subject's records so far.

    Attributes:
        folder: where its records are kept, if anywhere.
        source: yields the records that are not there yet, and None between their parts.
        records: one for each sample so far.
        seconds: time that they took.
        error: the reason why it cannot be measured to its end.
        in_hand: time that the sample in hand has taken.
        is_exhausted: the source has no more.
    """

    subject: Subject
    folder: RunFolder | None
    source: Iterator[SampleRecord | None]
    records: list[SampleRecord] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    in_hand: float = 0.0
    is_exhausted: bool = False

    def lacks(self, number: int) -> bool:
        """Return whether the record of a sample is still to be measured."""
        return self.error is None and not self.is_exhausted and len(self.records) == number

    def measure_part(self) -> None:
        """Measure on to the end of the sample in hand, or of its next part. Raises whatever measuring raises."""
        start = time.perf_counter()
        try:
            record = next(self.source)
        except StopIteration:
            self.is_exhausted = True
            return
        self.in_hand += time.perf_counter() - start
        if record is None:
            return
        seconds, self.in_hand = round(self.in_hand, 6), 0.0  # as it is kept: a resumed run adds up the same
        self.records.append(record)
        self.seconds += seconds
        if self.folder is not None:
            self.folder.append(record, seconds)


@dataclass(frozen=True)
class _Work:
    """One task with everything that is the same for every subject."""

    task: Task
    loaded: LoadedModel
    settings: Settings
    samples: Sequence[Sample]
    folders: RunFolders | None
    progress: Progress

    def begin(self, subject: Subject, opened: ExitStack) -> _UnfinishedRow:
        """Return a subject's row with the records that its run folder already has; `opened` closes the folder."""
        folder = None
        if self.folders is not None:
            folder = self.folders.open(self.task.name, subject.name, self.config(subject), self.samples)
            opened.enter_context(folder)
        records = [] if folder is None else list(folder.records)
        source = self.task.records(self.loaded, subject, self.samples[len(records) :], self.settings)
        row = _UnfinishedRow(subject, folder, iter(source), records, 0.0 if folder is None else folder.seconds)
        if folder is not None and len(records) > len(self.samples):
            row.error = (
                f"{folder.folder} has {len(records)} records of {len(self.samples)} samples; "
                "leave out --resume to start over"
            )
        return row

    def measure(self, rows: Sequence[_UnfinishedRow]) -> None:
        """Measure all samples, each of them in every row before the next."""
        name = rows[0].subject.name if len(rows) == 1 else f"{len(rows)} rows in turns"
        with self.progress(f"{self.task.name}: {name}", len(rows) * len(self.samples)) as advance:
            for number in range(len(self.samples)):
                waiting = list(rows)
                while waiting:
                    waiting = [row for row in waiting if not self._is_measured(row, number, advance)]

    def _is_measured(self, row: _UnfinishedRow, number: int, advance: Callable[[], Any]) -> bool:
        """Measure a row on, and return whether that is all of a sample."""
        if row.lacks(number):
            with self._failures(row):
                row.measure_part()
        if row.lacks(number):
            return False
        advance()
        return True

    def finish(self, unfinished: _UnfinishedRow, reference: Sequence[SampleRecord] | None) -> Row:
        """Return a subject's row, one with an error if it could not be measured, and keep it in its folder."""
        row = Row(self.task.name, unfinished.subject.name, *unfinished.subject.bits)
        if unfinished.error is None:
            with self._failures(unfinished):
                row = self._summarised(row, unfinished, reference)
        row = replace(row, error=unfinished.error)
        if unfinished.folder is not None:
            unfinished.folder.finish({**row.as_json(), **self._about(row)})
        return row

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

    def _summarised(self, row: Row, unfinished: _UnfinishedRow, reference: Sequence[SampleRecord] | None) -> Row:
        subject, records = unfinished.subject, unfinished.records
        metrics = self.task.summarise(records, reference, self.settings.seed)
        seen = sum(record["attended"]["total"] for record in records)
        quantized = sum(record["attended"]["quantized"] for record in records)
        row = replace(row, metrics=metrics, records=tuple(records), seconds=unfinished.seconds)
        row = replace(row, quantized_share=quantized / seen if seen else 0.0)
        unread = _nothing_quantized(subject, row, self.task.longer(self.settings))
        return replace(row, warnings=(*unread, *self.task.warnings(subject, metrics)))

    @contextmanager
    def _failures(self, row: _UnfinishedRow) -> Iterator[None]:
        """Turn errors that are an outcome of measuring into the row's error; others are raised."""
        try:
            yield
        except (PlanError, QuantizationError, EvaluationError) as error:
            row.error = str(error)
        except KvmixError:
            raise
        except _FAILURES as error:
            if is_out_of_memory(error):
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


def _shortage(context: Context | None, device: str) -> str:
    if context is None:
        return f"out of memory on {device}; free some and go on with --resume"
    return f"out of memory at {context.tokens} tokens on {device}; use a smaller {context.option}"


def _nothing_quantized(subject: Subject, row: Row, longer: str) -> list[str]:
    """Return a warning for a row that read nothing quantized; `longer` says how to get longer contexts."""
    if subject == Subject() or row.quantized_share > 0:
        return []
    if subject.plan is not None and subject.plan.evicts:
        return []  # it saves memory by dropping tokens
    if row.nominal_bits >= FULL_PRECISION_BITS:
        if subject.plan is None:
            return []
        reason = "the plan has 16 bits everywhere"
    elif subject.plan is None:
        reason = f"its full-precision window holds the whole context; {longer}"
    else:
        cache = subject.plan.cache
        reason = f"its sink ({cache.sink}), window ({cache.window.kind}) and page ({cache.page}) hold the whole context"
        reason += f"; {longer}"
    return [f"{subject.name}: NOTHING QUANTIZED WAS READ, so {row.task} says nothing about this plan: {reason}"]
