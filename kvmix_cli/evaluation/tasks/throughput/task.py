"""The throughput task: a sweep over contexts and batches, and the largest batch that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....cache.subject import Subject
from ....counting import counted
from ....decoding.timing import Timing, time_generation
from ....errors import EvaluationError
from ....models.memory import attempt, devices, free_memory, tidy
from ....plan.sizes import format_bytes
from ...base import Context, Sample, Settings, Task
from ...records import ThroughputRecord
from ...results import Estimate, Metric, Table
from .search import Search, time_largest
from .summary import metrics_of, points_table
from .text import rows, stretch

if TYPE_CHECKING:
    from ....models.loading import LoadedModel
    from ...results import Row

WARM_UP = 3
"""Tokens of the untimed generation before the first timed one at a point: kernels are chosen and compiled in it."""
TRIAL = 2
"""Tokens of a generation that only tries a batch: one after the prompt, and one decoded."""
OVERSHOOT = 2
"""On a CPU the search tries batches that take up to so many times the memory given."""
SPREAD = 0.25
"""Share of the median by which the fastest and the slowest repeat may differ without a warning."""


@dataclass(frozen=True)
class Point(Sample):
    """One repeat of one context and batch; all points share the text that their rows are cut from.

    Attributes:
        batch: None for the largest that fits.
    """

    context: int
    batch: int | None
    repeat: int


@dataclass(frozen=True)
class Throughput(Task[Point, ThroughputRecord]):
    """Each row of a batch gets a prompt of its own and decodes greedily; prompt and decoding are timed apart.

    Attributes:
        contexts: tokens of a prompt; None for the settings' length alone.
        new_tokens: tokens of each row's answer; the first one belongs to the prompt's time, the others to decoding.
        repeats: repeats of each point, each of them a record.
        memory: bytes for the search of the largest batch. None is the memory of a GPU; on a CPU, where running out of
            memory kills the process, there is then no search.
    """

    contexts: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1, 8)
    new_tokens: int = 32
    repeats: int = 3
    memory: int | None = None

    name = "throughput"
    metrics = (
        Metric("prompt_tokens_per_s", higher_is_better=True, unit="tokens/s"),
        Metric("decode_tokens_per_s", higher_is_better=True, unit="tokens/s"),
        Metric("decode_speedup", higher_is_better=True, unit="x", plans_only=True),
        Metric("cache_bytes", higher_is_better=False, unit="bytes"),
        Metric("largest_batch", higher_is_better=True, unit="sequences"),
        Metric("largest_batch_decode_tokens_per_s", higher_is_better=True, unit="tokens/s"),
        Metric("largest_batch_speedup", higher_is_better=True, unit="x", plans_only=True),
        Metric("largest_batch_cache_bytes", higher_is_better=False, unit="bytes"),
    )
    timed = True
    unread = ("prefix", "step")
    is_local = True

    def limit(self, settings: Settings) -> int:
        count = len(self.lengths(settings)) * len(self.batches) * self.repeats
        return count if settings.limit is None else min(count, settings.limit)

    def lengths(self, settings: Settings) -> tuple[int, ...]:
        """Return the lengths of prompts, ascending."""
        return tuple(sorted(set(self.contexts or (settings.length,))))

    def context(self, settings: Settings) -> Context:
        return Context("--contexts" if self.contexts else "--length", self.lengths(settings)[-1])

    def samples(self, loaded: LoadedModel, settings: Settings) -> list[Point]:
        self._check(loaded, settings)
        lengths = self.lengths(settings)
        text = stretch(loaded, settings, lengths[-1])
        points = [
            Point(f"{context} x {batch}, repeat {repeat}", text, context, batch, repeat)
            for context in lengths
            for batch in sorted(set(self.batches))
            for repeat in range(self.repeats)
        ]
        if self.memory is not None or loaded.device.type == "cuda":
            points += [Point(f"{context} x largest", text, context, None, 0) for context in lengths]
        return points[: settings.limit]

    def records(
        self, loaded: LoadedModel, subject: Subject, samples: Sequence[Point], settings: Settings
    ) -> Iterator[ThroughputRecord]:
        """Yield a record for each point. The first repeat is preceded by a warm-up; if that fails, all repeats have."""
        fits: dict[tuple[int, int], bool] = {}
        for point in samples:
            if point.batch is not None:
                key = (point.context, point.batch)
                if key not in fits:
                    fits[key] = _try(loaded, subject, point, point.batch, WARM_UP) is not None
                if not fits[key]:
                    yield self._record(point.context, point.batch, [])
                    continue
            yield self.measure(loaded, subject, point, settings)

    def measure(self, loaded: LoadedModel, subject: Subject, sample: Point, settings: Settings) -> ThroughputRecord:
        """Return one repeat, or all repeats of the largest batch that fits."""
        if sample.batch is None:
            return self._largest(loaded, subject, sample)
        timing = _try(loaded, subject, sample, sample.batch, self.new_tokens)
        return self._record(sample.context, sample.batch, [] if timing is None else [timing])

    def summarise(
        self, records: Sequence[ThroughputRecord], reference: Sequence[ThroughputRecord] | None, seed: int
    ) -> dict[str, Estimate]:
        """Return medians and extremes at the largest context and batch, the same ones in every row."""
        return metrics_of(records, reference)

    def details(self, rows: Sequence[Row]) -> list[Table]:
        return [points_table(rows)]

    def describe(self, samples: Sequence[Point], settings: Settings) -> str:
        contexts = sorted({point.context for point in samples})
        batches = sorted({point.batch for point in samples if point.batch is not None})
        sweep = " x ".join(", ".join(str(number) for number in each) for each in (contexts, batches))
        return (
            f"{counted(self.new_tokens, 'new token')} after prompts of {sweep}, the first one counted with its prompt; "
            f"medians of {counted(self.repeats, 'repeat')}, in brackets their extremes; "
            f"shown: {contexts[-1]} x {batches[-1]}; other caches than ours run under SDPA"
        )

    def warnings(self, subject: Subject, metrics: dict[str, Estimate]) -> list[str]:
        speed = metrics.get("decode_tokens_per_s")
        if speed is None:
            return [f"{subject.name}: out of memory at the largest context and batch; smaller ones are in its records"]
        spread = (speed.high - speed.low) / speed.value
        if spread <= SPREAD:
            return []
        return [
            f"{subject.name}: its repeats differ by {spread:.0%}, so speeds are rough: is the machine busy? "
            "Use more --repeats or --new-tokens"
        ]

    def _check(self, loaded: LoadedModel, settings: Settings) -> None:
        """Raise EvaluationError for what cannot be measured."""
        for name, least in (("new_tokens", 2), ("repeats", 1), ("memory", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluationError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        longest = self.lengths(settings)[-1]
        if not self.batches or min(*self.batches, *self.lengths(settings)) < 1:
            raise EvaluationError("--contexts and --batches must be at least 1")
        if loaded.max_length is not None and longest + self.new_tokens > loaded.max_length:
            raise EvaluationError(
                f"{longest} tokens and --new-tokens {self.new_tokens} are more than the model's limit of "
                f"{loaded.max_length}; use smaller --contexts or --length"
            )
        free = free_memory(devices(loaded.model)) if self.memory and loaded.device.type == "cpu" else None
        if free is not None and self.memory is not None and OVERSHOOT * self.memory > free:
            raise EvaluationError(
                f"--memory {format_bytes(self.memory)}: the search tries up to twice as much, and only "
                f"{format_bytes(free)} are free; give at most half of that"
            )

    def _largest(self, loaded: LoadedModel, subject: Subject, point: Point) -> ThroughputRecord:
        """Search for the largest batch, then time it."""
        on = devices(loaded.model)
        tidy(on)
        room = free_memory(on) if self.memory is None else self.memory
        search = Search(lambda batch: _try(loaded, subject, point, batch, TRIAL), self.memory)
        found = search.run(room)
        batch, timings = time_largest(
            lambda batch: _try(loaded, subject, point, batch, self.new_tokens), found, self.repeats
        )
        record = self._record(point.context, batch, timings)
        record["largest"] = True
        record["first_steps_fit"] = found
        record["tried"] = {str(number): needed for number, needed in sorted(search.tried.items())}
        return record

    def _record(self, context: int, batch: int, timings: Sequence[Timing]) -> ThroughputRecord:
        """Return the record of repeats of one batch; none mean that memory ran out."""
        peaks = [timing.peak_bytes for timing in timings if timing.peak_bytes is not None]
        return {
            "context": context,
            "batch": batch,
            "new_tokens": self.new_tokens,
            "tokens": len(timings) * batch * (self.new_tokens - 1),
            "out_of_memory": not timings,
            "prompt_seconds": [timing.prompt_seconds for timing in timings],
            "decode_seconds": [timing.decode_seconds for timing in timings],
            "cache_bytes": timings[-1].cache_bytes if timings else None,
            "peak_bytes": max(peaks, default=None),
            "attention": timings[-1].attention if timings else None,
            "attended": {
                "total": sum(timing.attended["total"] for timing in timings),
                "quantized": sum(timing.attended["quantized"] for timing in timings),
            },
        }


def _try(loaded: LoadedModel, subject: Subject, point: Point, batch: int, new_tokens: int) -> Timing | None:
    """Return one timed generation, None if memory ran out."""

    def work() -> Timing:
        return time_generation(loaded, subject, rows(loaded, point.ids, point.context, batch), new_tokens)

    return attempt(work, devices(loaded.model))
