"""`kvmix report DIR...`: all runs that can be compared in one table, and a page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from . import options

if TYPE_CHECKING:
    from ..evaluation.collect import Collection

PAGE = "report.html"
RESULTS = Path("results")


@options.expand
def report(
    ctx: typer.Context,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Folders that `kvmix eval` wrote into [default: results]."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the page goes [default: report.html in the first DIR].")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the tables as Markdown.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write all numbers, one a line.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Compare plans by it [default: the increase of perplexity, or else each task's first].",
        ),
    ] = None,
    common: options.CommonOptions = options.CommonOptions(),
) -> None:
    """Merge runs into tables and one page with plots. What cannot be compared stands in different tables or columns."""
    from ..evaluation.collect import collect
    from ..files import check_writable, write_text
    from ..reporting.page.page import make_page
    from ..reporting.page.tables import as_csv, as_json, group_tables, unfinished_table
    from ..reporting.page.tables import markdown as as_markdown

    places = folders or [RESULTS]
    collection = collect(places)
    _check_metric(collection, metric)
    page = html or _home(places[0]) / PAGE
    for path in (page, markdown, csv):
        if path is not None:
            check_writable(path)
    command = ctx.meta[options.COMMAND_LINE]
    _show(collection, metric)
    tables = [table for group in collection.groups for table in group_tables(group, metric)]
    tables += [unfinished_table(collection)] if collection.unfinished else []
    files = {page: make_page(collection, metric, command)}
    files |= {markdown: as_markdown(tables, command)} if markdown else {}
    files |= {csv: as_csv(collection)} if csv else {}
    for path, text in files.items():
        write_text(path, text.encode("utf-8", "replace").decode("utf-8"))
        console.notice(f"wrote {path}")
    console.emit_json({"command": "report", **as_json(collection, metric), "html": page})


def _home(place: Path) -> Path:
    """The folder itself; of a single run's, the one that it is in."""
    from ..evaluation.runs import CONFIG

    return place.parent if (place / CONFIG).is_file() else place


def _check_metric(collection: Collection, metric: str | None) -> None:
    """Raise EvaluationError for a metric that nothing has."""
    from ..errors import EvaluationError, did_you_mean
    from ..reporting.page.front import metric_names

    known = metric_names(collection)
    if metric is not None and metric not in known:
        there = f"the runs have {', '.join(known)}" if known else "no run is complete"
        raise EvaluationError(f"no metric '{metric}'{did_you_mean(metric, known)}; {there}")


def _show(collection: Collection, metric: str | None) -> None:
    """The tables, and what must be said about them."""
    from ..reporting.page.page import warnings
    from ..reporting.page.tables import group_tables, unfinished_table

    for line in (*collection.faults, *collection.notes):
        console.alert(f"warning: {line}")
    for group in collection.groups:
        for warning in warnings(group):
            console.alert(f"warning: {warning}")
        for table in group_tables(group, metric, console.width()):
            console.table(*table)
    if collection.unfinished:
        console.table(*unfinished_table(collection))
