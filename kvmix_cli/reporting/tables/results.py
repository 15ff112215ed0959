"""Results as tables: one model, shown in a terminal, as Markdown or in the page; and as CSV and plain data."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kvmix_kernels.layout import FULL_PRECISION_BITS

from ...evaluation.collect import Collection, Group, Line, Measurement
from ...evaluation.readback import LineKey
from ...evaluation.results import Metric, Table
from ..comparison import best_for_their_bits, column_name, headline, measured_metrics
from ..printable import one_line
from .evaluation import format_estimate, row_json

COLUMNS = ["plan", "nominal", "stored"]
MARK = " *"
MARKED = "* by its value: of the plans with as few stored bits, none has a better one; brackets are 95 % intervals"
BETWEEN = 3
"""Columns of a terminal between two columns of a table."""
CSV_COLUMNS = (
    "model",
    "task",
    "plan",
    "nominal_bits",
    "stored_bits",
    "quantized_share",
    "metric",
    "value",
    "low",
    "high",
    "unit",
    "error",
    "dtype",
    "device",
    "kvmix",
    "measurement",
    "folder",
)


class Cell(NamedTuple):
    """A number of a table, or a dash.

    Attributes:
        number: what a column is sorted by; None without a number.
        is_best: it is the best for its bits.
        is_nothing: it says that nothing was measured: a failure, or a share of no quantized tokens.
        hint: more about it.
    """

    text: str
    number: float | None = None
    is_best: bool = False
    is_nothing: bool = False
    hint: str = ""

    @property
    def value(self) -> str:
        """The text without interval and percent sign."""
        return self.text.replace(" %", "").partition(" [")[0]

    @property
    def interval(self) -> str:
        """The interval in brackets; empty without one."""
        _, bracket, interval = self.text.replace(" %", "").partition(" [")
        return f"[{interval}" if bracket else ""


class Block(NamedTuple):
    """The columns of one measurement: the quantized share, then metrics; `cells` has the lines that were measured."""

    measurement: Measurement
    metrics: Sequence[Metric]
    cells: Mapping[LineKey, Sequence[Cell]]

    def row(self, line: Line) -> Sequence[Cell]:
        """Return a line's cells, dashes for a line that was not measured."""
        return self.cells.get(line.key, [Cell("-")] * (1 + len(self.metrics)))


def block(group: Group, measurement: Measurement, metrics: Sequence[Metric], wanted: str | None) -> Block:
    """Return the columns of a measurement for some of its metrics."""
    main = headline(measurement, wanted)
    best = best_for_their_bits(group, measurement, main) if main else set()
    cells = {
        line.key: _cells(measurement, line, metrics, main if line.key in best else None)
        for line in group.lines
        if line.key in measurement.runs
    }
    return Block(measurement, metrics, cells)


def _cells(measurement: Measurement, line: Line, metrics: Sequence[Metric], best: Metric | None) -> list[Cell]:
    row = measurement.runs[line.key].row
    if row.error is not None:
        return [Cell("failed", is_nothing=True, hint=row.error), *(Cell("-") for _ in metrics)]
    is_nothing = not row.quantized_share and line.nominal_bits < FULL_PRECISION_BITS
    found = [Cell(f"{row.quantized_share:.1%}", row.quantized_share, is_nothing=is_nothing)]
    for metric in metrics:
        estimate = row.metrics.get(metric.name)
        number = None if estimate is None else estimate.value
        found.append(Cell(format_estimate(estimate, metric.unit), number, is_best=metric == best))
    return found


def bits(line: Line) -> tuple[str, str]:
    """Return nominal and stored bits; a dash for what cannot be told."""
    return f"{line.nominal_bits:.2f}", "-" if line.stored_bits is None else f"{line.stored_bits:.2f}"


def group_tables(group: Group, wanted: str | None, width: int | None = None) -> list[Table]:
    """Return a group's table, in as many pieces as a width takes, each with whole measurements.

    A measurement that is too wide even alone is turned, if that is any narrower: then its numbers are the rows.
    """
    blocks = [block(group, each, measured_metrics(each), wanted) for each in group.measurements]
    tables = [_table(group, piece) for piece in _pieces(group, blocks, width)]
    return [table if width is None else _narrow(table, width) for table in tables]


def _pieces(group: Group, blocks: Sequence[Block], width: int | None) -> Iterator[list[Block]]:
    """Yield blocks that fit a width together; a block that does not fit even alone stands alone."""
    piece: list[Block] = []
    for each in blocks:
        if piece and width is not None and _width(_table(group, [*piece, each])) > width:
            yield piece
            piece = []
        piece.append(each)
    if piece:
        yield piece


def _table(group: Group, blocks: Sequence[Block]) -> Table:
    columns = [*COLUMNS, *(one_line(name) for each in blocks for name in _names(each))]
    lines = [line for line in group.lines if any(line.key in each.cells for each in blocks)]
    rows = [
        [one_line(line.label), *bits(line), *(_text(each) for block in blocks for each in block.row(line))]
        for line in lines
    ]
    notes = [f"{each.measurement.title}: {each.measurement.description}" for each in blocks]
    if any(each.is_best for block in blocks for cells in block.cells.values() for each in cells):
        notes.append(MARKED)
    tasks = ", ".join(each.measurement.title for each in blocks)
    title = one_line(f"{tasks} of {group.title}")
    return Table(title, columns, rows, "".join(f"{one_line(note)}\n" for note in notes))


def _names(block: Block) -> Iterator[str]:
    """Yield the heads of a block's columns, with what tells its measurement from others of the task."""
    told = f", {block.measurement.told}" if block.measurement.told else ""
    yield "quantized"
    yield from (f"{column_name(metric)}{told}" for metric in block.metrics)


def _text(cell: Cell) -> str:
    return cell.text + MARK if cell.is_best else cell.text


def _width(table: Table) -> int:
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    return sum(widths) + BETWEEN * (len(widths) - 1)


def _narrow(table: Table, width: int) -> Table:
    """Return the table, or one with its rows as columns if only that fits, or fits better."""
    columns, *rows = zip(table.columns, *table.rows, strict=True)
    turned = table._replace(columns=columns, rows=rows)
    return table if _width(table) <= max(width, _width(turned)) else turned


def unfinished_table(collection: Collection) -> Table:
    """Return what was interrupted or is still going on."""
    rows = [
        [*map(one_line, (run.task, run.model, run.plan)), f"{run.done} of {run.samples}"]
        for run in collection.unfinished
    ]
    commands = dict.fromkeys(run.command for run in collection.unfinished if run.command)
    lines = [f"go on with `{each}{'' if '--resume' in each else ' --resume'}`" for each in map(one_line, commands)]
    return Table("unfinished", ["task", "model", "plan", "samples"], rows, "\n".join([*lines, ""]))


def as_csv(collection: Collection) -> str:
    """Return one line a number, for spreadsheets; a run that failed has one line with its error."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for group in collection.groups:
        for measurement in group.measurements:
            for line in group.lines:
                writer.writerows(_long_form(group, measurement, line))
    return text.getvalue()


def _long_form(group: Group, measurement: Measurement, line: Line) -> Iterator[dict[str, Any]]:
    run = measurement.runs.get(line.key)
    if run is None:
        return
    about: dict[str, Any] = {
        "model": group.model.id,
        "task": measurement.task,
        "plan": line.label,
        "measurement": measurement.told,
    }
    about |= {name: str(group.config[name]) for name in ("dtype", "device", "kvmix")}
    about |= {"nominal_bits": line.nominal_bits, "stored_bits": line.stored_bits, "folder": str(run.folder)}
    if run.row.error is not None:
        yield {**about, "error": run.row.error}
        return
    about["quantized_share"] = run.row.quantized_share
    units = {metric.name: metric.unit for metric in measurement.metrics}
    for name, estimate in run.row.metrics.items():
        numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        yield {**about, "metric": name, **numbers, "unit": units[name]}


def as_json(collection: Collection, wanted: str | None) -> dict[str, Any]:
    """Return plain data, rows as `kvmix eval --json` has them."""
    return {
        "groups": [_group_json(group, wanted) for group in collection.groups],
        "unfinished": [
            {"folder": run.folder, "model": run.model, "task": run.task, "plan": run.plan}
            | {"done": run.done, "samples": run.samples, "command": run.command}
            for run in collection.unfinished
        ],
        "faults": list(collection.faults),
        "notes": list(collection.notes),
    }


def _group_json(group: Group, wanted: str | None) -> dict[str, Any]:
    return {
        "model": group.model.id,
        **{name: group.config[name] for name in ("dtype", "device", "kvmix")},
        "measurements": [_measurement_json(group, measurement, wanted) for measurement in group.measurements],
    }


def _measurement_json(group: Group, measurement: Measurement, wanted: str | None) -> dict[str, Any]:
    main = headline(measurement, wanted)
    best = best_for_their_bits(group, measurement, main) if main else set()
    runs = [(line, measurement.runs[line.key]) for line in group.lines if line.key in measurement.runs]
    return {
        "task": measurement.task,
        "told": measurement.told,
        "description": measurement.description,
        "compared_by": main and main.name,
        "rows": [
            {**row_json(run.row), "plan": line.label, "best_for_its_bits": line.key in best, "folder": run.folder}
            for line, run in runs
        ],
    }
