"""Metrics of a throughput sweep, and the table of all its points, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, NamedTuple, cast

from ....cache.subject import UNQUANTIZED
from ....errors import EvaluationError
from ....plan.sizes import format_bytes
from ...records import ThroughputRecord
from ...results import Estimate, Table
from .search import MOST

if TYPE_CHECKING:
    from ...results import Row

COLUMNS = ("context", "batch", "plan", "attention", "prompt/s", "decode/s", "speedup", "cache", "peak")
NOTE = (
    "tokens a second; speedup of decoding against unquantized at the same context and batch, or of the largest batch "
    "against its largest\ncache at the end; peak above the model, with the prompt's activations\n"
)


class Place(NamedTuple):
    """A context and a batch; `batch` is None for the largest that fits."""

    context: int
    batch: int | None


@dataclass(frozen=True)
class Outcome:
    """All repeats of one place; without speeds if memory ran out."""

    batch: int
    attention: str | None = None
    prompt: Estimate | None = None
    decode: Estimate | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None

    def speedup(self, reference: Outcome | None) -> Estimate | None:
        """Return the ratio of medians. Its extremes are those of any two repeats, not only of two in the same turn."""
        if self.decode is None or reference is None or reference.decode is None:
            return None
        mine, theirs = self.decode, reference.decode
        return Estimate(mine.value / theirs.value, mine.low / theirs.high, mine.high / theirs.low)


def outcomes(records: Sequence[ThroughputRecord]) -> dict[Place, Outcome]:
    """Return a row's outcomes by place. Raises ValueError for a context of no tokens."""
    grouped: dict[Place, list[ThroughputRecord]] = {}
    for record in records:
        place = Place(record["context"], None if record.get("largest") else record["batch"])
        if place.context < 1:
            raise ValueError(f"a context of {place.context} tokens")
        grouped.setdefault(place, []).append(record)
    return {place: _outcome(group) for place, group in grouped.items()}


def metrics_of(
    records: Sequence[ThroughputRecord], reference: Sequence[ThroughputRecord] | None
) -> dict[str, Estimate]:
    """Return metrics at the largest context and batch, and at the largest batch that fits the largest context.

    A row that ran out of memory there has no speed, even if it has one elsewhere: a metric means the same in every row.

    Raises:
        EvaluationError: if memory ran out everywhere.
    """
    own, other = outcomes(records), outcomes(reference or ())
    if not any(outcome.decode for outcome in own.values()):
        raise EvaluationError("out of memory at every context and batch; use smaller --contexts or --batches")
    found: dict[str, Estimate | None] = {}
    if equal := [place for place in own if place.batch is not None]:
        place = max(equal)
        found["prompt_tokens_per_s"] = own[place].prompt
        found["decode_tokens_per_s"] = own[place].decode
        found["decode_speedup"] = own[place].speedup(other.get(place))
        found["cache_bytes"] = _exact(own[place].cache_bytes)
    if searched := [place for place in own if place.batch is None]:
        place = max(searched, key=lambda place: place.context)
        found["largest_batch"] = Estimate.exact(own[place].batch)
        found["largest_batch_decode_tokens_per_s"] = own[place].decode
        found["largest_batch_speedup"] = own[place].speedup(other.get(place))
        found["largest_batch_cache_bytes"] = _exact(own[place].cache_bytes)
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def points_table(rows: Sequence[Row]) -> Table:
    """Return a table of every place of every row, rows of one place together."""
    by_row = {row.plan: outcomes(cast("Sequence[ThroughputRecord]", row.records)) for row in rows}
    places = {place for own in by_row.values() for place in own}
    reference = by_row.get(UNQUANTIZED, {})
    cells = [
        _cells(name, place, own[place], reference.get(place) if name != UNQUANTIZED else None)
        for place in sorted(places, key=lambda place: (place.context, place.batch or math.inf))
        for name, own in by_row.items()
        if place in own
    ]
    return Table("throughput by context and batch", COLUMNS, cells, NOTE)


def _outcome(group: Sequence[ThroughputRecord]) -> Outcome:
    last = group[-1]
    if any(record["out_of_memory"] for record in group):
        return Outcome(last["batch"])
    batch, steps = last["batch"], last["new_tokens"] - 1
    peaks = [record["peak_bytes"] for record in group if record["peak_bytes"] is not None]
    return Outcome(
        batch=batch,
        attention=last["attention"],
        prompt=_speed(batch * last["context"], [each for record in group for each in record["prompt_seconds"]]),
        decode=_speed(batch * steps, [each for record in group for each in record["decode_seconds"]]),
        cache_bytes=last["cache_bytes"],
        peak_bytes=max(peaks, default=None),
    )


def _speed(tokens: int, seconds: Sequence[float]) -> Estimate:
    """Return tokens a second: the median of the repeats, and their extremes."""
    return Estimate(tokens / median(seconds), tokens / max(seconds), tokens / min(seconds))


def _exact(count: int | None) -> Estimate | None:
    return None if count is None else Estimate.exact(count)


def _cells(name: str, place: Place, own: Outcome, reference: Outcome | None) -> list[str]:
    batch = str(own.batch)
    if place.batch is None:
        batch += " (largest)" if own.batch < MOST else " or more"
    head = [str(place.context), batch, name]
    if own.decode is None:
        return [*head, "-", "-", "out of memory", "-", "-", "-"]
    sizes = ["-" if size is None else format_bytes(size) for size in (own.cache_bytes, own.peak_bytes)]
    faster = own.speedup(reference)
    speeds = [_spread(own.prompt), _spread(own.decode), "-" if faster is None else _spread(faster, "x")]
    return [*head, own.attention or "-", *speeds, *sizes]


def _spread(estimate: Estimate | None, unit: str = "") -> str:
    """Return `123 [119, 130]`, in three significant digits or whole."""
    if estimate is None:
        return "-"
    numbers = (estimate.value, estimate.low, estimate.high)
    value, low, high = (f"{each:.{0 if each >= 100 else 1 if each >= 10 else 2}f}{unit}" for each in numbers)
    return value if low == high else f"{value} [{low}, {high}]"
