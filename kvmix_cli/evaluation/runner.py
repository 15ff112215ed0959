"""Running a task: the unquantized cache first, then every plan, on the same samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from kvmix_kernels.layout import FULL_PRECISION_BITS

from .. import __version__
from ..errors import EvaluationError, PlanError, QuantizationError
from .base import Record, Sample, Settings, Subject, Task
from .report import Report, Row
from .runs import Run, Runs

if TYPE_CHECKING:
    from ..models import LoadedModel

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
    """Measure the unquantized cache and then each subject.

    A subject that cannot be measured (its plan does not fit, its numbers cannot be quantized, no memory is left)
    gets a row with an error; the others are measured all the same.

    Raises:
        KvmixError: if there is nothing to measure on, or the run's folder cannot be used.
    """
    settings.check(loaded.max_length)
    samples = task.samples(loaded, settings)
    bench = _Bench(task, loaded, settings, samples, progress)
    rows: list[Row] = []
    for subject in (Subject(), *subjects):
        run = None if runs is None else runs.open(task.name, subject.name, bench.config(subject))
        rows.append(bench.row(subject, rows[0].records or None if rows else None, run))
    tokens = next((sum(record["tokens"] for record in row.records) for row in rows if row.records), 0)
    return Report(task.name, tokens, task.describe(samples, settings), tuple(rows), bench.shortage())


@dataclass(frozen=True)
class _Bench:
    """One task, set up: the same model, samples and settings for every subject."""

    task: Task
    loaded: LoadedModel
    settings: Settings
    samples: Sequence[Sample]
    progress: Progress

    def row(self, subject: Subject, reference: Sequence[Record] | None, run: Run | None) -> Row:
        """A subject's row; one with an error if it cannot be measured."""
        row = self._empty_row(subject)
        try:
            records = self._records(subject, run)
            metrics = self.task.summarise(records, reference, self.settings.seed)
        except (PlanError, QuantizationError, EvaluationError) as error:
            return replace(row, error=str(error))
        except torch.OutOfMemoryError:
            where = f"{self.settings.length} tokens on {self.loaded.device}"
            return replace(row, error=f"out of memory at {where}; use a smaller --length")
        seen, quantized = (sum(record["attended"][key] for record in records) for key in ("total", "quantized"))
        share = quantized / seen if seen else 0.0
        row = replace(row, quantized_share=share, metrics=metrics, records=tuple(records))
        row = replace(row, warnings=(*_unquantized(subject, row), *self.task.warnings(subject, metrics)))
        if run is not None:
            run.finish(row.as_json())
        return row

    def config(self, subject: Subject) -> dict[str, Any]:
        """Everything that a subject's numbers depend on, as plain data."""
        return {
            "kvmix": __version__,
            "task": self.task.name,
            "model": self.loaded.info.model_dump(mode="json"),
            "dtype": self.loaded.dtype,
            "device": self.loaded.device.type,
            "attention": self.loaded.model.config._attn_implementation,
            "settings": asdict(self.settings),
            "samples": {"count": len(self.samples), "sha256": hashlib.sha256(repr(self.samples).encode()).hexdigest()},
            "plan": subject.plan and {"short": subject.plan.short, "sha256": subject.plan.sha256},
        }

    def shortage(self) -> tuple[str, ...]:
        """What to say if there is less to measure on than was asked for."""
        asked, found = self.task.limit(self.settings), len(self.samples)
        return () if found >= asked else (f"{self.task.name}: {self.settings.text} has {found} samples, not {asked}",)

    def _records(self, subject: Subject, run: Run | None) -> list[Record]:
        """One record a sample; those that an earlier run has left are not measured again."""
        records = [] if run is None else list(run.records)
        if run is not None and len(records) > len(self.samples):
            raise EvaluationError(
                f"{run.samples} has {len(records)} records of {len(self.samples)} samples: did two runs share it? "
                "Leave out --resume to start over"
            )
        with self.progress(f"{self.task.name}: {subject.name}", len(self.samples)) as advance:
            for number, sample in enumerate(self.samples):
                if number >= len(records):
                    records.append(self.task.measure(self.loaded, subject, sample, self.settings))
                    if run is not None:
                        run.append(records[-1])
                advance()
        return records

    def _empty_row(self, subject: Subject) -> Row:
        bits = (
            (FULL_PRECISION_BITS,) * 2
            if subject.plan is None
            else (subject.plan.bits.nominal, subject.plan.bits.stored)
        )
        return Row(self.task.name, subject.name, *bits)


def _unquantized(subject: Subject, row: Row) -> list[str]:
    """A loud word on a row that has measured nothing."""
    if subject.plan is None or row.quantized_share > 0:
        return []
    if row.nominal_bits >= FULL_PRECISION_BITS:
        reason = "the plan has 16 bits everywhere"
    else:
        cache = subject.plan.cache
        reason = f"its sink ({cache.sink}), window ({cache.window.kind}) and page ({cache.page}) hold the whole context"
        reason += "; use a larger --length and --prefix"
    return [f"{subject.name}: NOTHING QUANTIZED WAS READ, so {row.task} says nothing about this plan: {reason}"]
