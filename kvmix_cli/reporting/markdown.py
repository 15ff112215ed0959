"""Tables as Markdown, with everything that comes from files escaped."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.results import Table
from .printable import one_line

SPECIAL = {ord(character): f"\\{character}" for character in "\\`*_|"} | {
    ord("&"): "&amp;",
    ord("<"): "&lt;",
    ord(">"): "&gt;",
}


def markdown_text(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line."""
    return one_line(text).translate(SPECIAL).replace("](", "]\\(")


def markdown_table(table: Table) -> str:
    """Return a table with its title as a heading and its footer as a list."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    grid = [f"| {' | '.join(markdown_text(str(cell)) for cell in line)} |" for line in lines]
    notes = [f"- {markdown_text(line)}" for line in table.footer.splitlines()]
    return "\n".join([f"## {markdown_text(table.title)}", "", *grid, "", *notes, *([""] if notes else [])])


def markdown_document(tables: Sequence[Table], command: str, opening: Sequence[str] = ()) -> str:
    """Return tables as a file that begins with the command that made it.

    Args:
        opening: sentences that stand before the tables, a list item each.
    """
    head = [f"<!-- {one_line(command).replace('>', '&gt;')} -->"]
    told = ["", *(f"- {markdown_text(line)}" for line in opening)] if opening else []
    return "\n".join([*head, *told, *(f"\n{markdown_table(table)}" for table in tables)])
