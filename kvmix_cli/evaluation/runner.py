"""Running a task: the unquantized cache first, then every plan, on the same samples."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch
from kvmix_kernels.layout import FULL_PRECISION_BITS

from .._version import __version__
from ..cache.subject import Subject
from ..errors import EvaluationError, KvmixError, PlanError, QuantizationError, first_sentence
from .base import Context, Sample, Settings, Task
from .machine import machine
from .results import Record, Report, Row
from .runs import Run, Runs

if TYPE_CHECKING:
    from ..models.loading import LoadedModel

Progress = Callable[[str, int], AbstractContextManager[Callable[[], Any]]]
"""Called with a title and a number of steps; what it gives is called after each step."""


@contextmanager
def no_progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Progress that nobody watches."""
    yield lambda: None


def run_task(
    task: Task,
    loaded: LoadedModel,
    subjects: Sequence[Subject],
    settings: Settings,
    runs: Runs | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Measure the unquantized cache and then each subject; or, if what is measured is time, all of them in turns.

    A subject that cannot be measured (its plan does not fit, its numbers cannot be quantized, no memory is left)
    gets a row with an error; the others are measured all the same.

    Raises:
        KvmixError: if there is nothing to measure on, or the run's folder cannot be used.
    """
    settings.check()
    task.check_context(settings, loaded.max_length)
    samples = task.samples(loaded, settings)
    bench = _Bench(task, loaded, settings, samples, progress)
    rows: list[Row] = []
    everyone = (Subject(), *subjects)
    for group in [everyone] if task.timed else [(subject,) for subject in everyone]:
        with ExitStack() as opened:
            lanes = [bench.lane(subject, runs, opened) for subject in group]
            bench.drive(lanes)
            for lane in lanes:
                rows.append(bench.row(lane, rows[0].records or None if rows else None))
    tokens = next((sum(record["tokens"] for record in row.records) for row in rows if row.records), 0)
    return Report(task.name, tokens, task.describe(samples, settings), tuple(rows), task.notices(samples, settings))


@dataclass
class _Lane:
    """One subject's way through the samples.

    Attributes:
        run: where its records are kept, if anywhere.
        source: of the records that an earlier run has not left.
        records: one a sample, as far as it has come.
        seconds: that they took.
        error: why it stands still before its end.
    """

    subject: Subject
    run: Run | None
    source: Iterator[Record]
    records: list[Record]
    seconds: float
    error: str | None = None

    def step(self) -> None:
        """One more record, if there is one. Raises whatever measuring raises."""
        start = time.perf_counter()
        record = next(self.source, None)
        if record is None:
            return
        seconds = time.perf_counter() - start
        self.records.append(record)
        self.seconds += seconds
        if self.run is not None:
            self.run.append(record, seconds)


@dataclass(frozen=True)
class _Bench:
    """One task, set up: the same model, samples and settings for every subject."""

    task: Task
    loaded: LoadedModel
    settings: Settings
    samples: Sequence[Sample]
    progress: Progress

    def lane(self, subject: Subject, runs: Runs | None, opened: ExitStack) -> _Lane:
        """A subject at its start, or where an earlier run has left it. Raises KvmixError if its folder is of no use."""
        run = None
        if runs is not None:
            run = opened.enter_context(runs.open(self.task.name, subject.name, self.config(subject)))
        records = [] if run is None else list(run.records)
        rest = self.task.records(self.loaded, subject, self.samples[len(records) :], self.settings)
        lane = _Lane(subject, run, rest, records, 0.0 if run is None else run.seconds)
        if run is not None and len(records) > len(self.samples):
            lane.error = (
                f"{run.samples} has {len(records)} records of {len(self.samples)} samples: did two runs share it? "
                "Leave out --resume to start over"
            )
        return lane

    def drive(self, lanes: Sequence[_Lane]) -> None:
        """Measure all samples. Lanes take turns sample by sample, so that a machine's moods come to all of them."""
        name = lanes[0].subject.name if len(lanes) == 1 else f"{len(lanes)} rows in turns"
        with self.progress(f"{self.task.name}: {name}", len(lanes) * len(self.samples)) as advance:
            for number in range(len(self.samples)):
                for lane in lanes:
                    if lane.error is None and len(lane.records) == number:
                        self._step(lane)
                    advance()

    def row(self, lane: _Lane, reference: Sequence[Record] | None) -> Row:
        """A subject's row; one with an error if it cannot be measured."""
        row = self._measured(lane, reference)
        if lane.run is not None:
            lane.run.finish({**row.as_json(), **self._about(row)})
        return row

    def _step(self, lane: _Lane) -> None:
        try:
            lane.step()
        except Exception as error:  # noqa: BLE001  (raised again if it is no outcome of measuring)
            lane.error = self._failure(lane.subject, error)

    def _measured(self, lane: _Lane, reference: Sequence[Record] | None) -> Row:
        subject, records = lane.subject, lane.records
        row = self._empty_row(subject)
        if lane.error is not None:
            return replace(row, error=lane.error)
        try:
            metrics = self.task.summarise(records, reference, self.settings.seed)
        except Exception as error:  # noqa: BLE001  (as above)
            return replace(row, error=self._failure(subject, error))
        seen, quantized = (sum(record["attended"][key] for record in records) for key in ("total", "quantized"))
        share = quantized / seen if seen else 0.0
        row = replace(row, quantized_share=share, metrics=metrics, records=tuple(records), seconds=lane.seconds)
        longer = self.task.longer(self.settings)
        return replace(row, warnings=(*_unquantized(subject, row, longer), *self.task.warnings(subject, metrics)))

    def config(self, subject: Subject) -> dict[str, Any]:
        """Everything that a subject's numbers depend on, as plain data; times depend on the machine, too."""
        options = json.loads(json.dumps(self.task.options(), default=str))
        return {
            "kvmix": __version__,
            "task": self.task.name,
            "model": self.loaded.info.model_dump(mode="json"),
            "dtype": self.loaded.dtype,
            "device": self.loaded.device.type,
            "attention": self.loaded.model.config._attn_implementation,
            "settings": asdict(self.settings),
            **({"options": options} if options else {}),
            **({"machine": machine(self.loaded.device)} if self.task.timed else {}),
            "samples": {"count": len(self.samples), "sha256": hashlib.sha256(repr(self.samples).encode()).hexdigest()},
            "plan": subject.plan and {"short": subject.plan.short, "sha256": subject.plan.sha256},
            **({"baseline": dict(subject.baseline.settings)} if subject.baseline else {}),
        }

    def _failure(self, subject: Subject, error: Exception) -> str:
        """What a row says instead of numbers. Raises the error itself where that would hide a fault of ours."""
        if isinstance(error, (PlanError, QuantizationError, EvaluationError)):
            return str(error)
        if isinstance(error, torch.OutOfMemoryError):
            return _shortage(self.task.context(self.settings), str(self.loaded.device))
        if subject.baseline is None or isinstance(error, KvmixError):
            raise error
        return f"{type(error).__name__}: {first_sentence(error)}"

    def _about(self, row: Row) -> dict[str, Any]:
        """What a reader of the row must know who has not seen the task."""
        return {
            "tokens": sum(record["tokens"] for record in row.records),
            "description": self.task.describe(self.samples, self.settings),
            "metric_info": {metric.name: asdict(metric) for metric in self.task.metrics},
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(self.loaded.device),
        }

    def _empty_row(self, subject: Subject) -> Row:
        return Row(self.task.name, subject.name, *subject.bits)


def _shortage(context: Context | None, device: str) -> str:
    """What to do when memory is out."""
    if context is None:
        return f"out of memory on {device}; free some and go on with --resume"
    return f"out of memory at {context.tokens} tokens on {device}; use a smaller {context.option}"


def _unquantized(subject: Subject, row: Row, longer: str) -> list[str]:
    """A loud word on a row that has measured nothing; `longer` says how to get longer contexts."""
    if subject == Subject() or row.quantized_share > 0:
        return []
    if subject.plan is not None and subject.plan.cache.tokens is not None and subject.plan.cache.tokens.evict:
        return []  # its bits are what it drops
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
