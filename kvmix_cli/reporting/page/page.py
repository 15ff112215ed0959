"""The page: one file that asks nothing of the network. Everything that comes from files is escaped by its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources
from typing import Any, NamedTuple

from ..._version import __version__
from ...counting import counted
from ...evaluation.collect import Collection, Group, Line
from ...evaluation.readback import LineKey, Measured
from ..comparison import main_metrics, measured_metrics, short_name, warnings
from ..plots.drawing import Look
from ..printable import printable
from ..tables.results import Block, bits, block
from ..tables.verdict import answers, verdicts
from ..words import heads_text
from .figures import Figures, bits_figures, heat_figures, looks, quality_figures, speed_figures


class PageRow(NamedTuple):
    """A plan's name, with what the pointer shows, and its look and bits; its cells come from the blocks."""

    line: Line
    hint: str
    look: Look
    bits: Sequence[tuple[str, float | None]]


class PageTable(NamedTuple):
    """A table of some measurements; lines that none of them has are left out."""

    blocks: Sequence[Block]
    rows: Sequence[PageRow]


class Section(NamedTuple):
    """All that the page says of one group."""

    title: str
    facts: list[str]
    verdicts: list[str]
    warnings: list[str]
    overview: PageTable
    measured: list[tuple[str, str]]
    figures: list[Figures]
    tables: list[tuple[PageTable, str]]


def make_page(collection: Collection, wanted: str | None, command: str) -> str:
    """Return the page as text.

    Args:
        wanted: the metric to compare by, see `comparison.headline`.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = resources.files(__package__)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["short_name"] = short_name
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    page = template.render(
        title=_title(collection),
        answers=answers(collection),
        facts=_head_facts(collection.groups),
        groups=[_section(group, wanted) for group in collection.groups],
        unfinished=collection.unfinished,
        left_out=[*collection.faults, *collection.notes],
        foot=_foot(collection.groups, command),
        version=__version__,
        style=Markup((folder / "style.css").read_text(encoding="utf-8")),
        script=Markup((folder / "sort.js").read_text(encoding="utf-8")),
    )
    return printable(page.lstrip())


def _title(collection: Collection) -> str:
    models = dict.fromkeys([group.model.id for group in collection.groups])
    models |= dict.fromkeys(run.model for run in collection.unfinished)
    return ", ".join(models)


def _head_facts(groups: Sequence[Group]) -> list[str]:
    if len(groups) == 1:
        return _facts(groups[0])
    return [f"{len(groups)} parts, across which nothing is compared" if groups else "no run is complete"]


def _section(group: Group, wanted: str | None) -> Section:
    look, faults = looks(group), list[str]()
    figures = [
        *quality_figures(group, look, wanted),
        *bits_figures(group, look),
        *heat_figures(group, look, faults),
        *speed_figures(group, look, faults),
    ]
    main = [block(group, each, main_metrics(each, wanted), wanted) for each in group.measurements]
    every = [block(group, each, measured_metrics(each), wanted) for each in group.measurements]
    return Section(
        title=group.title,
        facts=_facts(group),
        verdicts=[each.text for each in verdicts(group)[1:]],
        warnings=[*warnings(group), *faults],
        overview=_table(group, look, main),
        measured=[(each.title, each.description) for each in group.measurements],
        figures=figures,
        tables=[(_table(group, look, [each]), each.measurement.description) for each in every],
    )


def _table(group: Group, looks: Mapping[LineKey, Look], blocks: Sequence[Block]) -> PageTable:
    lines = [line for line in group.lines if any(line.key in each.cells for each in blocks)]
    rows = [
        PageRow(
            line,
            line.label if line.widths in (None, line.label) else f"{line.label}: {line.widths}",
            looks[line.key],
            list(zip(bits(line), (line.nominal_bits, line.stored_bits), strict=True)),
        )
        for line in lines
    ]
    return PageTable(blocks, rows)


def _facts(group: Group) -> list[str]:
    model, config = group.model, group.config
    planned = len(model.quantizable)
    layers = (
        counted(model.layers, "layer") if planned == model.layers else f"{planned} of {model.layers} layers planned"
    )
    heads = f"{counted(model.kv_heads, 'KV head')} of {model.head_dim}"
    return [
        f"{layers}, {heads if len(model.geometries) == 1 and model.value_dim is None else heads_text(model)}",
        f"{config['dtype']} on {config['device']}",
        f"kvmix {config['kvmix']}",
        *_when(group.runs),
    ]


def _when(runs: Sequence[Measured]) -> list[str]:
    days = sorted({run.finished.date().isoformat() for run in runs if run.finished})
    return [f"measured {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "")] if days else []


def _foot(groups: Sequence[Group], command: str) -> list[str]:
    machines = dict.fromkeys(_machine(run.machine) for group in groups for run in group.runs if run.machine)
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    return [*(f"Measured on {machine}." for machine in machines), f"Made on {now} by kvmix {__version__}: {command}"]


def _machine(machine: Mapping[str, Any]) -> str:
    named = dict(machine)
    device, threads = named.pop("device", "an unknown device"), named.pop("threads", None)
    beside = [] if threads is None else [counted(threads, "thread")]
    return ", ".join([str(device), *beside, *(f"{name} {version}" for name, version in named.items())])
