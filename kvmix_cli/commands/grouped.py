"""Help in groups: options of one `rich_help_panel` under its name, in plain text.

Typer shows panels only in boxes drawn by rich, which change with the width of the terminal; plain text stays the same
for scripts, pagers and screen readers.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

ARGUMENTS, OPTIONS = "Arguments", "Options"


class GroupedCommand(TyperCommand):
    """A command whose options are shown in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each group with its heading, in the order in which groups first appear."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                plain = ARGUMENTS if is_argument else OPTIONS
                if is_argument:  # some versions of Typer put Python's type behind the name: `DIR <list[Path]>`
                    record = (str(parameter.metavar or record[0]), record[1])
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or plain, []).append(record)
        for name in sorted(groups, key=lambda name: name != ARGUMENTS):
            with formatter.section(name):
                formatter.write_dl(groups[name])
