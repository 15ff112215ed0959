"""`kvmix report DIR...`: an answer in words, all runs that can be compared in tables, and a page with plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..errors import OutputError
from . import options
from .values import output_option

if TYPE_CHECKING:
    from ..evaluation.collect import Collection

PAGE = "report.html"
RESULTS = Path("results")


@options.expand
def report(
    ctx: typer.Context,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DIR", help="Folders that `kvmix eval` wrote into [default: results]."),
    ] = None,
    html: Annotated[
        Path | None,
        output_option("Where the page goes [default: report.html in the first DIR]."),
    ] = None,
    markdown: Annotated[Path | None, output_option("Also write the tables as Markdown.")] = None,
    csv: Annotated[Path | None, output_option("Also write all numbers, one a line.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Compare plans by it [default: the increase of perplexity, or else each task's first].",
        ),
    ] = None,
    common: options.CommonOptions = options.CommonOptions(),
) -> None:
    """Say in words which plans are safe; merge runs into tables and one page with plots."""
    from ..evaluation.collect import collect
    from ..reporting.comparison import check_metric
    from ..reporting.page.page import make_page
    from ..reporting.plan_names import with_names
    from ..reporting.tables.results import as_csv, as_json
    from ..reporting.tables.verdict import answers

    places = folders or [RESULTS]
    collection = with_names(collect(places), places)
    check_metric(collection, metric)
    page = html or _home(places[0]) / PAGE
    _check_outputs([path for path in (page, markdown, csv) if path is not None])
    command = ctx.meta[options.COMMAND_LINE]
    _show(collection, metric)
    files = {page: make_page(collection, metric, command)}
    if markdown:
        files[markdown] = _markdown(collection, metric, command)
    if csv:
        files[csv] = as_csv(collection)
    _write(files)
    answered = {"answers": answers(collection)}
    console.emit_json({"command": "report", **as_json(collection, metric), **answered, "html": page})


def _check_outputs(paths: Sequence[Path]) -> None:
    """Raise OutputError if a file cannot be written, or two of them are one."""
    from ..files import check_writable

    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        check_writable(path)
        if resolved.count(place) > 1:
            raise OutputError(f"two outputs would be {path}: give each of them a name of its own")


def _write(files: Mapping[Path, str]) -> None:
    """Write the files, each whole or not at all. Raises OutputError, which says what is saved by then."""
    from ..files import after_saving, write_text
    from ..reporting.printable import printable

    written: list[str] = []
    for path, text in files.items():
        with after_saving(f"all runs are as they were{', and saved is ' + ', '.join(written) if written else ''}"):
            written.append(str(write_text(path, printable(text))))
        console.notice(f"wrote {path}")


def _markdown(collection: Collection, metric: str | None, command: str) -> str:
    from ..reporting.markdown import markdown_document
    from ..reporting.tables.results import group_tables, unfinished_table
    from ..reporting.tables.verdict import answers

    tables = [table for group in collection.groups for table in group_tables(group, metric)]
    tables += [unfinished_table(collection)] if collection.unfinished else []
    return markdown_document(tables, command, answers(collection))


def _home(place: Path) -> Path:
    """Return the folder itself; for the folder of a single run, the one that it is in."""
    from ..evaluation.run_folder import CONFIG

    return place.parent if (place / CONFIG).is_file() else place


def _show(collection: Collection, metric: str | None) -> None:
    """Show the answers, the tables, and what must be said about them."""
    from ..reporting.comparison import warnings
    from ..reporting.tables.results import group_tables, unfinished_table
    from ..reporting.tables.verdict import answers

    for line in (*collection.faults, *collection.notes):
        console.alert(f"warning: {line}")
    for text in answers(collection):
        console.text(f"{text}\n\n")
    for group in collection.groups:
        for warning in warnings(group):
            console.alert(f"warning: {warning}")
        for table in group_tables(group, metric, console.width()):
            console.table(*table)
    if collection.unfinished:
        console.table(*unfinished_table(collection))
