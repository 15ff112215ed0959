"""Names of plans that were measured under a checksum, as a leaderboard measures each plan once for all its names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..evaluation.collect import Collection, Line
from .printable import one_line

NAMES = "leaderboard.json"
"""File beside the runs of a leaderboard: the names of each plan, by the name of its runs."""


def names_text(named: Mapping[str, Sequence[str]]) -> str:
    """Return the content of the file, from the names of every plan by the name of its runs."""
    return json.dumps({plan: list(names) for plan, names in named.items()}, indent=2) + "\n"


def with_names(collection: Collection, places: Sequence[Path]) -> Collection:
    """Label plans that were measured under a checksum with their names; with their widths if no file has names."""
    known: dict[str, str] = {}
    for place in places:
        for path in (place / NAMES, place.parent / NAMES):
            labels = {plan: one_line(", ".join(names)) for plan, names in read_names(path).items() if names}
            known = {**labels, **known}
    groups = [
        replace(group, lines=tuple(replace(line, label=_label(line, known)) for line in group.lines))
        for group in collection.groups
    ]
    return replace(collection, groups=tuple(groups))


def _label(line: Line, known: Mapping[str, str]) -> str:
    name, checksum = line.key
    if line.widths is None or checksum is None or len(name) < 8 or not checksum.startswith(name):
        return line.label
    return known.get(name, f"{line.widths} ({name})")


def read_names(path: Path) -> dict[str, list[str]]:
    """Return the names in a file; nothing if it is missing or holds anything else: it only makes tables readable."""
    try:
        found = json.loads(path.read_bytes())
        return {str(plan): [str(name) for name in names] for plan, names in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
