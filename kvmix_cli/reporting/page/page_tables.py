"""The page's tables: columns under the task that they belong to, intervals below their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvmix_kernels.layout import FULL_PRECISION_BITS

from ..evaluation import format_estimate as cell
from .front import best_for_their_bits, headline
from .look import Look
from .markup import point
from .tables import bits, column_name, share

if TYPE_CHECKING:
    from markupsafe import Markup

    from ...evaluation.collect import Group, Line, LineKey, Measurement
    from ...evaluation.results import Estimate, Metric

Chosen = Sequence[tuple["Measurement", Sequence["Metric"]]]
"""Measurements, and those of their metrics that have a column."""
UNITS_IN_CELLS = ("bytes", "x")
FIRST, NOTHING, BEST = "first-of-task", "nothing", "best"
"""Classes of the style sheet: the first column of a task, a number that is none, the best for its bits."""


class Cell(NamedTuple):
    """A cell.

    Attributes:
        sort: the number that a column is sorted by; empty if there is none.
        style: class names.
    """

    text: str
    sort: str = ""
    style: str = ""
    hint: str = ""
    interval: str = ""


class Column(NamedTuple):
    """The head of a column; `style` has class names."""

    name: str
    unit: str = ""
    style: str = ""


class Head(NamedTuple):
    """The head of a task's columns."""

    title: str
    span: int


class Row(NamedTuple):
    """A line's cells, bits first."""

    label: str
    hint: str
    point: Markup
    is_reference: bool
    cells: list[Cell]


class PageTable(NamedTuple):
    """A table with two rows of heads."""

    heads: list[Head]
    columns: list[Column]
    rows: list[Row]


def page_table(group: Group, looks: Mapping[LineKey, Look], chosen: Chosen, wanted: str | None) -> PageTable:
    """A table of some measurements; lines that none of them has are left out."""
    best = [_best(group, measurement, wanted) for measurement, _ in chosen]
    rows = []
    for line in group.lines:
        if any(line.key in measurement.runs for measurement, _ in chosen):
            cells = _bits_cells(line)
            for (measurement, metrics), bold in zip(chosen, best, strict=True):
                cells += _cells(measurement, line, metrics, bold.get(line.key))
            hint = line.label if line.widths in (None, line.label) else f"{line.label}: {line.widths}"
            rows.append(Row(line.label, hint, point(looks[line.key]), line.is_reference, cells))
    heads = [Head(measurement.title, 1 + len(metrics)) for measurement, metrics in chosen]
    columns = [column for _, metrics in chosen for column in _columns(metrics)]
    return PageTable(heads, columns, rows)


def _best(group: Group, measurement: Measurement, wanted: str | None) -> dict[LineKey, str]:
    """The metric by which a line is best for its bits."""
    metric = headline(measurement, wanted)
    return {} if metric is None else dict.fromkeys(best_for_their_bits(group, measurement, metric), metric.name)


def _columns(metrics: Sequence[Metric]) -> Iterator[Column]:
    yield Column("quantized", style=FIRST)
    for metric in metrics:
        yield Column(column_name(metric).removesuffix(" percent"), "" if metric.unit in UNITS_IN_CELLS else metric.unit)


def _bits_cells(line: Line) -> list[Cell]:
    numbers = (line.nominal_bits, line.stored_bits)
    return [Cell(text, _sort(number)) for text, number in zip(bits(line), numbers, strict=True)]


def _cells(measurement: Measurement, line: Line, metrics: Sequence[Metric], bold: str | None) -> Iterator[Cell]:
    """The share that was quantized, then the metrics; `bold` names the one that is best for its bits."""
    row = measurement.row(line)
    if row is None or row.error is not None:
        yield Cell("-", style=FIRST) if row is None else Cell("failed", "", f"{FIRST} {NOTHING}", row.error or "")
        yield from (Cell("-") for _ in metrics)
        return
    is_nothing = not row.quantized_share and line.nominal_bits < FULL_PRECISION_BITS
    style = f"{FIRST} {NOTHING}" if is_nothing else FIRST
    yield Cell(share(row.quantized_share), _sort(row.quantized_share), style)
    for metric in metrics:
        yield _number_cell(row.metrics.get(metric.name), metric, BEST if metric.name == bold else "")


def _number_cell(estimate: Estimate | None, metric: Metric, style: str) -> Cell:
    if estimate is None:
        return Cell("-")
    text, bracket, interval = cell(estimate, metric.unit).replace(" %", "").partition(" [")
    return Cell(text, _sort(estimate.value), style, interval=f"[{interval}" if bracket else "")


def _sort(number: float | None) -> str:
    return "" if number is None else repr(float(number))
