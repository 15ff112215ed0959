"""`--dry-run`: say what a command would do, how long it takes and how many bytes, and do none of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .. import console

if TYPE_CHECKING:
    from ..studies.dry_run import DryRun

DryRunFlag = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done and about how long it takes, and do none of it.")
]


def show_work(command: str, found: DryRun) -> None:
    """Show the work of a command."""
    from ..reporting.tables.dry_run import dry_run_json, dry_run_table

    console.table(*dry_run_table(command, found))
    console.emit_json(dry_run_json(command, found))
