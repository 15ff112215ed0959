"""The work that a command would do, as a table and as plain data."""

from __future__ import annotations

from typing import Any

from ...evaluation.results import Table
from ...plan.sizes import format_bytes
from ...studies.dry_run import DryRun


def duration_text(seconds: float | None) -> str:
    """Return a time as text, `12 s` or `3 min`."""
    if seconds is None:
        return "not known"
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"


def dry_run_table(command: str, found: DryRun) -> Table:
    """Return the steps of a command with their times, which are estimates, and what these rest on."""
    rows = [(step.name, step.what, duration_text(step.seconds)) for step in found.steps]
    total = f"about {duration_text(found.seconds)} in all, what is kept already not counted off"
    lines = [] if found.seconds is None else [total]
    lines += [f"about {format_bytes(found.memory)} of memory"] if found.memory is not None else []
    lines += [f"writes {path}" for path in found.writes]
    title = f"what {command} would do with {found.model}; nothing was done"
    return Table(title, ("step", "what", "about"), rows, "\n".join([*lines, found.basis]) + "\n")


def dry_run_json(command: str, found: DryRun) -> dict[str, Any]:
    """Return the work of a command as `--dry-run --json` prints it."""
    return {
        "command": command,
        "dry_run": True,
        "model": found.model,
        "steps": [{"name": step.name, "what": step.what, "seconds": step.seconds} for step in found.steps],
        "seconds": found.seconds,
        "memory_bytes": found.memory,
        "writes": list(found.writes),
        "basis": found.basis,
    }
