"""An evaluation as tables, and as plain data for `--json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...evaluation.positions import PositionBucket, by_position
from ...evaluation.results import Estimate, Metric, Report, Row, Table
from ...plan.sizes import format_bytes
from ..words import layers_json, layers_text

if TYPE_CHECKING:
    from ...evaluation.base import Task
    from ...plan import ModelInfo
    from ...studies.measure import Evaluation

MAX_COLUMNS = 10
"""A table with more is turned: a line for each metric, a column for each plan."""


def report_tables(task: Task, report: Report, model: ModelInfo) -> list[Table]:
    """Return a table of one task's rows, and the task's own tables of details."""
    metrics = [metric for metric in task.metrics if any(metric.name in row.metrics for row in report.rows)]
    columns = ("plan", "nominal", "stored", "quantized", *(metric.name.replace("_", " ") for metric in metrics))
    grid: list[Sequence[str]] = [columns, *(_cells(row, metrics) for row in report.rows)]
    if len(columns) > max(MAX_COLUMNS, len(grid)):
        grid = list(zip(*grid, strict=True))
    layers = layers_text(model)
    caption = f"{report.description}\n" + (f"{layers}\n" if layers else "")
    main = Table(f"{task.name} of {model.id}", grid[0], grid[1:], caption)
    return [main, *task.details(report.rows)]


def _cells(row: Row, metrics: Sequence[Metric]) -> list[str]:
    """Return a row of the table; what was not measured is a dash."""
    stored = "-" if row.stored_bits is None else f"{row.stored_bits:.2f}"
    cells = [row.plan, f"{row.nominal_bits:.2f}", stored, f"{row.quantized_share:.1%}"]
    return cells + [format_estimate(row.metrics.get(metric.name), metric.unit) for metric in metrics]


def format_estimate(estimate: Estimate | None, unit: str) -> str:
    """Return `13.25 [12.10, 14.31]`; without an interval where there is none, a dash where nothing was measured."""
    if estimate is None:
        return "-"
    value, low, high = (_format_number(number, unit) for number in (estimate.value, estimate.low, estimate.high))
    return value if estimate.low == estimate.high else f"{value} [{low}, {high}]"


def _format_number(value: float, unit: str) -> str:
    if unit == "bytes":
        return format_bytes(value)
    if unit == "%":
        return f"{round(value, 2) + 0.0:+.2f} %"
    return f"{round(value, 4) + 0.0:+.4f}" if unit == "nats" else f"{value:.4g}" + ("x" if unit == "x" else "")


def report_warnings(report: Report) -> list[str]:
    """Return the lines about a report that even a quiet user must see."""
    warnings = (*report.warnings, *(warning for row in report.rows for warning in row.warnings))
    failures = [f"{row.plan} could not be measured: {row.error}" for row in report.rows if row.error is not None]
    return [*(f"warning: {warning}" for warning in warnings), *failures]


def rows_json(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Return all rows of all reports as plain data."""
    return [row_json(row) for report in reports for row in report.rows]


def row_json(row: Row) -> dict[str, Any]:
    """Return a row as plain data, with its divergence by position if its records have one."""
    buckets = by_position(row.records)
    return {**row.as_json(), **({"by_position": [_bucket_json(bucket) for bucket in buckets]} if buckets else {})}


def _bucket_json(bucket: PositionBucket) -> dict[str, Any]:
    return {**bucket, "kl": asdict(bucket["kl"]), "same_token": asdict(bucket["same_token"])}


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as `kvmix eval --json` prints it."""
    reports = evaluation.reports
    return {
        "command": "eval",
        "model": evaluation.model.id,
        "task": ",".join(report.task for report in reports),
        "tokens": sum(report.tokens for report in reports),
        "layers": layers_json(evaluation.model),
        "rows": rows_json(reports),
        "reference": reports[0].reference.plan,
        "descriptions": {report.task: report.description for report in reports},
        "warnings": [warning for report in reports for warning in report.warnings],
        "gates": [
            {"expression": verdict.expression, "passed": verdict.passed, "failures": list(verdict.failures)}
            for verdict in evaluation.verdicts
        ],
    }
