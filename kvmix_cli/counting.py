"""Numbers with their nouns, in the singular where they are 1."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """Return a number with its noun: `1 document`, `2 documents`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
