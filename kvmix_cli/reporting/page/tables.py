"""The tables: for a terminal, as Markdown, as CSV, and as plain data for `--json`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..evaluation import format_estimate as cell
from .front import best_for_their_bits, headline, measured_metrics

if TYPE_CHECKING:
    from ...evaluation.collect import Collection, Group, Line, LineKey, Measurement
    from ...evaluation.results import Metric

COLUMNS = ["plan", "nominal", "stored"]
MARK = " *"
MARKED = "* of the plans with as few stored bits, none is better"
BETWEEN = 2
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


class Table(NamedTuple):
    """As `console.table` takes it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    footer: str = ""


class _Block(NamedTuple):
    """The columns of one measurement; a line that it does not have has dashes."""

    measurement: Measurement
    columns: list[str]
    cells: dict[LineKey, list[str]]


def group_tables(group: Group, wanted: str | None, width: int | None = None) -> list[Table]:
    """A group's table, in as many pieces as a width takes, each with whole measurements.

    A measurement that is too wide even alone is turned, if that is any narrower: then its numbers are the rows.
    """
    head = {line.key: [line.label, *bits(line)] for line in group.lines}
    blocks = [_block(group, measurement, wanted) for measurement in group.measurements]
    tables = [_table(group, head, piece) for piece in _pieces(head, blocks, width)]
    return [table if width is None else _narrow(table, width) for table in tables]


def bits(line: Line) -> tuple[str, str]:
    """Nominal and stored; a dash for what cannot be told."""
    return f"{line.nominal_bits:.2f}", "-" if line.stored_bits is None else f"{line.stored_bits:.2f}"


def column_name(metric: Metric) -> str:
    """`loss increase`."""
    return metric.name.replace("_", " ")


def _block(group: Group, measurement: Measurement, wanted: str | None) -> _Block:
    metrics, main = measured_metrics(measurement), headline(measurement, wanted)
    best = best_for_their_bits(group, measurement, main) if main else set()
    told = f", {measurement.told}" if measurement.told else ""
    cells = {}
    for key, run in measurement.runs.items():
        texts = [cell(run.row.metrics.get(metric.name), metric.unit) for metric in metrics]
        if key in best:
            texts = [text + MARK if metric == main else text for text, metric in zip(texts, metrics, strict=True)]
        cells[key] = [share(run.row.quantized_share), *texts] if run.row.error is None else ["failed"]
    return _Block(measurement, ["quantized", *(f"{column_name(metric)}{told}" for metric in metrics)], cells)


def share(part: float) -> str:
    """`87.2%`."""
    return f"{part:.1%}"


def _pieces(head: dict[LineKey, list[str]], blocks: Sequence[_Block], width: int | None) -> Iterator[list[_Block]]:
    """Blocks that fit a width together; a block that does not fit even alone stands alone."""
    first = _width(COLUMNS, list(head.values()))
    piece: list[_Block] = []
    used = first
    for block in blocks:
        needed = BETWEEN + _width(block.columns, list(block.cells.values()))
        if piece and width is not None and used + needed > width:
            yield piece
            piece, used = [], first
        piece.append(block)
        used += needed
    if piece:
        yield piece


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    widths = [
        max([len(name), *(len(row[index]) for row in rows if index < len(row))]) for index, name in enumerate(columns)
    ]
    return sum(widths) + BETWEEN * (len(widths) - 1)


def _table(group: Group, head: dict[LineKey, list[str]], blocks: Sequence[_Block]) -> Table:
    columns = [*COLUMNS, *(name for block in blocks for name in block.columns)]
    rows = [
        [*start, *(text for block in blocks for text in _filled(block, key))]
        for key, start in head.items()
        if any(key in block.cells for block in blocks)
    ]
    measured = [f"{block.measurement.title}: {block.measurement.description}" for block in blocks]
    if any(text.endswith(MARK) for row in rows for text in row):
        measured.append(MARKED)
    tasks = ", ".join(block.measurement.title for block in blocks)
    return Table(f"{tasks} of {group.title}", columns, rows, "".join(f"{line}\n" for line in measured))


def _narrow(table: Table, width: int) -> Table:
    """The table, or with its rows as columns if only that fits, or fits better."""
    own, turned = (_width(each.columns, each.rows) for each in (table, _turned(table)))
    return table if own <= max(width, turned) else _turned(table)


def _turned(table: Table) -> Table:
    """Rows as columns."""
    columns, *rows = zip(table.columns, *table.rows, strict=True)
    return table._replace(columns=columns, rows=rows)


def _filled(block: _Block, key: LineKey) -> list[str]:
    cells = block.cells.get(key, [])
    return cells + ["-"] * (len(block.columns) - len(cells))


def unfinished_table(collection: Collection) -> Table:
    """What was interrupted or is still going on."""
    rows = [[run.task, run.model, run.plan, f"{run.done} of {run.samples}"] for run in collection.unfinished]
    return Table("unfinished", ["task", "model", "plan", "samples"], rows, "`kvmix eval ... --resume` goes on\n")


def markdown(tables: Sequence[Table], command: str) -> str:
    """The same tables in a file, with the command that made them."""
    return "\n".join([f"<!-- {command.replace('>', '&gt;')} -->", *(_section(table) for table in tables)])


def _section(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    grid = [f"| {' | '.join(map(_escaped, line))} |" for line in lines]
    notes = [f"- {_escaped(line)}" for line in table.footer.splitlines()]
    return "\n".join(["", f"## {_escaped(table.title)}", "", *grid, "", *notes, *([""] if notes else [])])


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    special = {ord(character): f"\\{character}" for character in "\\`*_|"}
    entities = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}
    return " ".join(text.split()).translate(special | entities).replace("](", "]\\(")


def as_csv(collection: Collection) -> str:
    """One line a number, for spreadsheets; a run that failed has one line with its error."""
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
    """Plain data, rows as `kvmix eval --json` has them."""
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
            {**run.row.as_json(), "plan": line.label, "best_for_its_bits": line.key in best, "folder": run.folder}
            for line, run in runs
        ],
    }
