"""Leaderboards of `kvmix eval`: methods of allocation, and published systems, against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from .. import console, state
from ..ranks import current
from .eval_options import BoardOptions

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from ..evaluation.results import Report
    from ..models.loading import LoadedModel
    from ..studies.leaderboard import Board
    from ..studies.measure import Setup

ROW_FAILED = 1


def hold_leaderboard(board: BoardOptions, setup: Setup) -> None:
    """Hold a leaderboard, show it, and leave a table and a plot of it beside the records."""
    from ..evaluation import split_tasks
    from ..evaluation.runs import RunFolders
    from ..files import check_writable
    from ..profile import Profile
    from ..studies.leaderboard import hold

    rules = board.rules
    path = state.find_profile(rules.pop("profile", None), model=setup.model, say=console.notice)
    profile = Profile.load(path)
    state.check_owner(path, profile.model.id, setup.model)
    tasks = split_tasks("perplexity,recall" if setup.tasks is None else setup.tasks)
    root = setup.results["root"]
    check_writable(root / "leaderboard.png")
    found = hold(
        profile,
        lambda: _load(profile.model.id, setup),
        folder=path.parent,
        tasks=tasks,
        settings=setup.settings,
        runs=RunFolders(model=state.slug(profile.model.id), **setup.results),
        group_sizes=rules.pop("group_size", ()),
        progress=console.progress,
        **rules,
    )
    _show_board(setup, profile.model.id, tasks, found, "leaderboard")


def hold_systems(board: BoardOptions, names: Sequence[str], options: dict[str, Any], setup: Setup) -> None:
    """Measure published methods at equal stored bytes, show them, and leave a table and a plot beside the records."""
    from ..evaluation import get_tasks, split_tasks
    from ..evaluation.runs import RunFolders
    from ..files import check_writable
    from ..models.loading import load_info
    from ..studies.leaderboard.systems import TASKS, find_measured
    from ..studies.leaderboard.systems import hold_systems as hold

    tasks = TASKS if setup.tasks is None else split_tasks(setup.tasks)
    get_tasks(tasks, options)  # refuses an option that none of them has
    root = setup.results["root"]
    check_writable(root / "systems.png")
    measured = find_measured(board.profile, setup.model, console.notice)
    model = measured.profile.model.id if measured is not None and setup.model is None else str(setup.model)
    info = load_info(model, revision=setup.loading["revision"])
    rules = {"stored_bits": board.stored_bits} if board.stored_bits else {}
    found = hold(
        info,
        lambda: _load(model, setup),
        tasks=tasks,
        options=options,
        settings=setup.settings,
        runs=RunFolders(model=state.slug(model), **setup.results),
        names=names,
        measured=measured,
        progress=console.progress,
        **rules,
    )
    _show_board(setup, model, tasks, found, "systems")


def _show_board(setup: Setup, model: str, tasks: Sequence[str], found: Board, name: str) -> None:
    """Show a board, and write its tables and its picture beside the records."""
    from ..evaluation.identity import short_checksum
    from ..files import write_text
    from ..reporting.markdown import markdown_document
    from ..reporting.plan_names import NAMES, names_text, read_names
    from ..reporting.tables.leaderboard import board_json, plan_names, tables
    from ..reporting.tables.systems import system_tables

    if not current().leads:
        return
    root = setup.results["root"]
    for report in found.reports:
        warn(report)
    shown = tables(found) if name == "leaderboard" else system_tables(found, setup.settings.length)
    from ..reporting.plots.leaderboard import plot_board

    page = root / f"{name}__{short_checksum(shown)}.md"
    picture = page.with_suffix(".png")
    with saved(root):
        for table in shown:
            console.table(*table)
        write_text(page, markdown_document(shown, setup.results["command"]))
        write_text(root / NAMES, names_text({**read_names(root / NAMES), **plan_names(found)}))
        plot_board(found, picture)
        console.text(f"tables:  {page}\npicture: {picture}\n")
        head = {"command": "eval", "model": model, "task": ",".join(tasks)}
        console.emit_json({**head, **board_json(found), "page": page, "plot": picture})
    leave(found.reports)


def _load(model: str, setup: Setup) -> LoadedModel:
    from ..models.loading import load_model  # torch, after all options are checked

    return load_model(model, **setup.loading)


def saved(root: Path) -> AbstractContextManager[None]:
    """Say of an output that cannot be written, within a block, that everything measured is in a folder."""
    from ..files import after_saving

    return after_saving(f"all samples and rows are saved in {root}: the same command with --resume writes the rest")


def leave(reports: Sequence[Report]) -> None:
    """Leave with code 1 if a subject could not be measured."""
    if any(row.error is not None for report in reports for row in report.rows):
        raise typer.Exit(ROW_FAILED)


def warn(report: Report) -> None:
    """Show the lines about a report that even a quiet user must see."""
    from ..reporting.tables.evaluation import report_warnings

    for line in report_warnings(report):
        console.alert(line)
