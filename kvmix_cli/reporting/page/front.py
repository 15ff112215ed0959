"""Which number a comparison is about, and who does best with as few bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...evaluation.collect import Collection, Group, Line, LineKey, Measurement
    from ...evaluation.results import Estimate, Metric

PREFERRED = ("perplexity_increase_percent", "perplexity")
"""An increase has a paired interval: how hard the texts are, which moves every plan alike, is not in it."""
OVERVIEW = ("perplexity", "measured_bytes", "decode_tokens_per_s", "decode_speedup", "largest_batch")
"""What else belongs into a table of the main numbers."""
NO_QUALITY = ("bytes", "x")
"""Units of what a cache takes, not of what its model still can."""


def headline(measurement: Measurement, wanted: str | None = None) -> Metric | None:
    """The number by which a measurement compares plans: the one that is wanted, or else the best known one.

    None for a measurement of bytes or times, unless one of its numbers is wanted.
    """
    measured = measured_metrics(measurement)
    named = {metric.name: metric for metric in measured}
    for name in (wanted, *PREFERRED):
        if name in named:
            return named[name]
    first = next(iter(measured), None)
    return None if first is None or measurement.timed or first.unit in NO_QUALITY else first


def main_metrics(measurement: Measurement, wanted: str | None) -> list[Metric]:
    """Those for a table of the main numbers, at least one."""
    measured, main = measured_metrics(measurement), headline(measurement, wanted)
    return [metric for metric in measured if metric == main or metric.name in OVERVIEW] or measured[:1]


def measured_metrics(measurement: Measurement) -> list[Metric]:
    """Those that some line has."""
    rows = [run.row for run in measurement.runs.values()]
    return [metric for metric in measurement.metrics if any(metric.name in row.metrics for row in rows)]


def metric_names(collection: Collection) -> list[str]:
    """All that were measured."""
    metrics = [m for group in collection.groups for measurement in group.measurements for m in measurement.metrics]
    return list(dict.fromkeys(metric.name for metric in metrics))


def best_for_their_bits(group: Group, measurement: Measurement, metric: Metric) -> set[LineKey]:
    """Plans to which no other is better, or as good and smaller, with as few stored bits."""
    found = [(line, estimate) for line, estimate in comparable(group, measurement, metric) if line.stored_bits]
    points = [(line.stored_bits or 0.0, estimate.value) for line, estimate in found]
    return {found[index][0].key for index in front(points, metric.higher_is_better)}


def comparable(group: Group, measurement: Measurement, metric: Metric) -> list[tuple[Line, Estimate]]:
    """Plans and baselines that have the number, and that did read quantized keys and values for it."""
    rows = [(line, measurement.row(line)) for line in group.lines if not line.is_reference]
    return [
        (line, row.metrics[metric.name])
        for line, row in rows
        if row is not None and metric.name in row.metrics and row.quantized_share > 0
    ]


def front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """Indices of the (cost, quality) points that no other one dominates, from the smallest cost."""
    sign = 1 if higher_is_better else -1
    signed = [(cost, sign * quality) for cost, quality in points]
    kept = [
        index
        for index, (cost, quality) in enumerate(signed)
        if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in signed)
    ]
    return sorted(kept, key=lambda index: signed[index])
