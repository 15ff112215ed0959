"""The page: one file that asks nothing of the network. Everything that comes from files is escaped by its template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib import resources
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from .figures import bits_figures, heat_figures, quality_figures, speed_figures
from .front import main_metrics, measured_metrics
from .look import looks
from .markup import raw
from .page_tables import page_table

if TYPE_CHECKING:
    from ...evaluation.collect import Collection, Group, Measured


def make_page(collection: Collection, wanted: str | None, command: str) -> str:
    """The page as text. `wanted` is the metric to compare by, see `front.headline`."""
    from jinja2 import Environment, StrictUndefined

    folder = resources.files(__package__)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    page = template.render(
        title=_title(collection),
        facts=_head_facts(collection.groups),
        groups=[_group(group, wanted) for group in collection.groups],
        unfinished=collection.unfinished,
        left_out=[*collection.faults, *collection.notes],
        foot=_foot(collection.groups, command),
        version=__version__,
        style=raw((folder / "style.css").read_text(encoding="utf-8")),
        script=raw((folder / "sort.js").read_text(encoding="utf-8")),
    )
    return page.lstrip()


def warnings(group: Group) -> Iterator[str]:
    """What a reader must know before believing a table."""
    for measurement in group.measurements:
        for run in measurement.runs.values():
            if run.row.error is not None:
                yield f"{measurement.title}: {run.row.plan} could not be measured: {run.row.error}"
            yield from (f"{measurement.title}: {warning}" for warning in run.row.warnings)


def _title(collection: Collection) -> str:
    models = dict.fromkeys([group.model.id for group in collection.groups])
    models |= dict.fromkeys(run.model for run in collection.unfinished)
    return ", ".join(models)


def _head_facts(groups: Sequence[Group]) -> list[str]:
    if len(groups) == 1:
        return _facts(groups[0])
    return [f"{len(groups)} parts, across which nothing is compared" if groups else "no run is complete"]


def _group(group: Group, wanted: str | None) -> dict[str, Any]:
    look, faults = looks(group), list[str]()
    figures = [
        *quality_figures(group, look, wanted),
        *bits_figures(group, look),
        *heat_figures(group, look, faults),
        *speed_figures(group, look, faults),
    ]
    main = [(each, main_metrics(each, wanted)) for each in group.measurements]
    return {
        "title": group.title,
        "facts": _facts(group),
        "warnings": [*warnings(group), *faults],
        "overview": page_table(group, look, main, wanted),
        "measured": [(each.title, each.description) for each in group.measurements],
        "figures": figures,
        "tables": [
            (page_table(group, look, [(each, measured_metrics(each))], wanted), each.description)
            for each in group.measurements
        ],
    }


def _facts(group: Group) -> list[str]:
    model, config = group.model, group.config
    planned = len(model.quantizable)
    layers = f"{model.layers} layers" if planned == model.layers else f"{planned} of {model.layers} layers planned"
    heads = f"{model.kv_heads} KV head" + ("s" if model.kv_heads > 1 else "")
    return [
        f"{layers}, {heads} of {model.head_dim}",
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
    beside = [] if threads is None else ["1 thread" if threads == 1 else f"{threads} threads"]
    return ", ".join([str(device), *beside, *(f"{name} {version}" for name, version in named.items())])
