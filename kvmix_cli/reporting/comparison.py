"""The number that plans are compared by, and the plans that are best for their bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import EvaluationError, did_you_mean
from ..evaluation.collect import Collection, Group, Line, Measurement
from ..evaluation.readback import LineKey
from ..evaluation.results import Estimate, Metric

PREFERRED = ("perplexity_increase_percent", "perplexity")
"""An increase has a paired interval: how hard the texts are, which moves every plan alike, is not in it."""
OVERVIEW = (
    "perplexity",
    "kl",
    "same_token",
    "measured_bytes",
    "decode_tokens_per_s",
    "decode_speedup",
    "largest_batch",
)
"""Further metrics in a table of the main numbers."""
ITSELF = {"kl": 0.0, "kl_p99": 0.0, "same_token": 1.0}
"""The unquantized cache's predictions, compared with themselves."""
NO_QUALITY = ("bytes", "x")
"""Units of bytes and factors: what a cache takes, not what its model still can."""


def headline(measurement: Measurement, wanted: str | None = None) -> Metric | None:
    """Return the number by which a measurement compares plans: the one that is wanted, or else the best known one.

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
    """Return the metrics for a table of the main numbers, at least one."""
    measured, main = measured_metrics(measurement), headline(measurement, wanted)
    return [metric for metric in measured if metric == main or metric.name in OVERVIEW] or measured[:1]


def measured_metrics(measurement: Measurement) -> list[Metric]:
    """Return the metrics that some line has."""
    rows = [run.row for run in measurement.runs.values()]
    return [metric for metric in measurement.metrics if any(metric.name in row.metrics for row in rows)]


def reference_number(group: Group, measurement: Measurement, metric: Metric) -> float | None:
    """Return the unquantized cache's number, None if it is not known; compared with itself it has not changed."""
    if metric.plans_only:
        is_difference = "increase" in metric.name or metric.name.endswith("_change")
        return 0.0 if is_difference else ITSELF.get(metric.name)
    estimates = [measurement.estimate(line, metric.name) for line in group.lines if line.is_reference]
    return next((estimate.value for estimate in estimates if estimate is not None), None)


def short_name(metric: Metric) -> str:
    """Return `perplexity increase`, without the unit."""
    return column_name(metric).removesuffix(" percent")


def column_name(metric: Metric) -> str:
    """Return `loss increase` for `loss_increase`."""
    return metric.name.replace("_", " ")


def check_metric(collection: Collection, wanted: str | None) -> None:
    """Raise EvaluationError for a metric that no run has."""
    known = _metric_names(collection)
    if wanted is not None and wanted not in known:
        there = f"the runs have {', '.join(known)}" if known else "no run is complete"
        raise EvaluationError(f"no metric '{wanted}'{did_you_mean(wanted, known)}; {there}")


def _metric_names(collection: Collection) -> list[str]:
    metrics = [m for group in collection.groups for measurement in group.measurements for m in measurement.metrics]
    return list(dict.fromkeys(metric.name for metric in metrics))


def best_for_their_bits(group: Group, measurement: Measurement, metric: Metric) -> set[LineKey]:
    """Return the plans to which no other is better, or as good and smaller, with as few stored bits."""
    found = [(line, estimate) for line, estimate in comparable(group, measurement, metric) if line.stored_bits]
    points = [(line.stored_bits or 0.0, estimate.value) for line, estimate in found]
    return {found[index][0].key for index in front(points, metric.higher_is_better)}


def comparable(group: Group, measurement: Measurement, metric: Metric) -> list[tuple[Line, Estimate]]:
    """Return the plans and baselines that have the number and did read quantized keys and values for it."""
    rows = [(line, measurement.row(line)) for line in group.lines if not line.is_reference]
    return [
        (line, row.metrics[metric.name])
        for line, row in rows
        if row is not None and metric.name in row.metrics and row.quantized_share > 0
    ]


def front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """Return indices of the (cost, quality) points that no other one dominates, from the smallest cost."""
    sign = 1 if higher_is_better else -1
    signed = [(cost, sign * quality) for cost, quality in points]
    kept = [
        index
        for index, (cost, quality) in enumerate(signed)
        if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in signed)
    ]
    return sorted(kept, key=lambda index: signed[index])


def warnings(group: Group) -> Iterator[str]:
    """Yield what a reader must know before believing a table."""
    for measurement in group.measurements:
        for run in measurement.runs.values():
            if run.row.error is not None:
                yield f"{measurement.title}: {run.row.plan} could not be measured: {run.row.error}"
            yield from (f"{measurement.title}: {warning}" for warning in run.row.warnings)
