"""Recall by the place of values: the table behind a heat map, made from records, without torch.

A record has `context` (tokens) and `answers`, each with `recalled`, `depth` (the part of the filler before it, 0 to 1)
and `distance` (tokens from where the value was stated to where it was asked for).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from .bootstrap import proportion
from .results import Estimate

DEPTH_BINS = 10
MAX_DISTANCE_BINS = 10
SAME = 1e-6

Answer = Mapping[str, Any]
Labels = dict[int, str]
"""Labels of bins, by their numbers."""


@dataclass(frozen=True)
class RecallCell:
    """The values of one place: their count, and how many of them were recalled."""

    recalled: int
    count: int

    @property
    def share(self) -> float:
        """Return the share that was recalled, 0 to 1."""
        return self.recalled / self.count


@dataclass(frozen=True)
class RecallGrid:
    """Recall by depth (rows, the beginning of the context first) and by length or distance (columns, ascending).

    Attributes:
        rows: labels of the depths.
        columns: labels of the columns.
        across: title of the axis of the columns.
        cells: one row a depth; None where no value stood.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    across: str
    cells: tuple[tuple[RecallCell | None, ...], ...]
    down: str = "depth"


def grid(records: Sequence[Mapping[str, Any]]) -> RecallGrid | None:
    """Return the grid of a row's records; None if they have no depths.

    Columns are contexts. Where there is only one, and each exercise asks for several values, columns are distances. A
    single question is always at the end, so its distance says the same as its depth.
    """
    places = [
        (record["context"], answer)
        for record in records
        if "context" in record
        for answer in record.get("answers", ())
        if "depth" in answer
    ]
    if not places:
        return None
    row, rows = _depths([answer["depth"] for _, answer in places])
    contexts = sorted({context for context, _ in places})
    if len(contexts) == 1 and any(len(record["answers"]) > 1 for record in records):
        bin_of, labels = _distances([answer["distance"] for _, answer in places])
        columns, across = {number: labels[number] for number in sorted(labels)}, "distance (tokens)"
        keys = [(row(answer["depth"]), bin_of(answer["distance"])) for _, answer in places]
    else:
        columns, across = {context: str(context) for context in contexts}, "context (tokens)"
        keys = [(row(answer["depth"]), context) for context, answer in places]
    tally = dict.fromkeys(product(rows, columns), RecallCell(0, 0))
    for key, (_, answer) in zip(keys, places, strict=True):
        tally[key] = RecallCell(tally[key].recalled + bool(answer["recalled"]), tally[key].count + 1)
    cells = tuple(tuple(cell if (cell := tally[r, c]).count else None for c in columns) for r in rows)
    return RecallGrid(tuple(rows.values()), tuple(columns.values()), across, cells)


def by_depth(records: Sequence[Mapping[str, Any]]) -> dict[float, Estimate]:
    """Return the share of values that were recalled at each depth, ascending, with its interval over exercises."""
    tally: defaultdict[float, defaultdict[int, RecallCell]] = defaultdict(lambda: defaultdict(lambda: RecallCell(0, 0)))
    for number, record in enumerate(records):
        for answer in record.get("answers", ()):
            cells = tally[answer["depth"]]
            cells[number] = RecallCell(cells[number].recalled + bool(answer["recalled"]), cells[number].count + 1)
    return {
        depth: proportion([cell.recalled for cell in cells.values()], [cell.count for cell in cells.values()])
        for depth, cells in sorted(tally.items())
    }


def _depths(depths: Sequence[float]) -> tuple[Callable[[float], int], Labels]:
    """Return the bin of a depth as a function, and labels of bins: of evenly spaced depths, otherwise of tenths."""
    distinct = sorted(set(depths))
    steps = len(distinct) - 1
    if steps > 0 and all(abs(depth - number / steps) < SAME for number, depth in enumerate(distinct)):
        return (lambda depth: round(depth * steps)), {n: f"{n / steps:.0%}" for n in range(steps + 1)}
    width = 100 // DEPTH_BINS

    def tenth(depth: float) -> int:
        return min(int(depth * DEPTH_BINS + SAME), DEPTH_BINS - 1)

    found = range(tenth(distinct[0]), tenth(distinct[-1]) + 1)
    return tenth, {number: f"{number * width}-{(number + 1) * width}%" for number in found}


def _distances(distances: Sequence[int]) -> tuple[Callable[[int], int], Labels]:
    """Return the bin of a distance as a function, and labels of bins, a power of two wide so that there are few."""
    width = 1
    while max(distances) // width - min(distances) // width >= MAX_DISTANCE_BINS:
        width *= 2
    found = range(min(distances) // width, max(distances) // width + 1)
    return (lambda distance: distance // width), {n: f"{n * width}-{(n + 1) * width - 1}" for n in found}
