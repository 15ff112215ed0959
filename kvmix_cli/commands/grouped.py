"""Help in groups: options of one `rich_help_panel` stand under its name, in plain text that scripts can read."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

FIRST = "Options"


class GroupedCommand(TyperCommand):
    """A command whose options are shown in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each group with its heading, in the order in which groups first appear."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(option, "rich_help_panel", None) or FIRST, []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)
