"""Where the names of points go, so that they hide neither each other nor the points."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .drawing import FONT, Anchor, text_width

DISTANCES = (9.0, 18.0, 30.0, 44.0, 60.0, 80.0)
LEADER = 12.0
"""A name farther away is joined to its point by a line."""
POINT = 6.0
"""Half the side of the square that a point takes."""
CROSSED = 0.35
"""How much farther away, in units a unit of area, a name goes to stand on no line."""


class Box(NamedTuple):
    """A rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def around(cls, point: tuple[float, float]) -> Box:
        """What a point takes."""
        return cls(point[0] - POINT, point[1] - POINT, point[0] + POINT, point[1] + POINT)

    @classmethod
    def along(cls, start: tuple[float, float], end: tuple[float, float]) -> Box:
        """What an upright or level line takes."""
        (left, right), (top, bottom) = sorted((start[0], end[0])), sorted((start[1], end[1]))
        return cls(left - 1, top - 1, right + 1, bottom + 1)

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def inside(self, other: Box) -> bool:
        """Whether the other one covers it all."""
        fits = self.left >= other.left and self.right <= other.right
        return fits and self.top >= other.top and self.bottom <= other.bottom


class Label(NamedTuple):
    """Where a text begins, ends or has its middle, on its base line.

    Attributes:
        leader: where a line to the point begins; None if the text stands beside it.
    """

    at: tuple[float, float]
    anchor: Anchor
    box: Box
    distance: float
    leader: tuple[float, float] | None


def place_labels(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    frame: Box,
    taken: Iterable[Box] = (),
    lines: Sequence[Box] = (),
) -> list[Label | None]:
    """A place for every text, in this order of precedence; None where there is no room at all.

    Args:
        taken: what no name may hide, beside the points and the other names.
        lines: what a name should rather not stand on.
    """
    occupied = [*taken, *map(Box.around, points)]
    placed: list[Label | None] = []
    for point, text in zip(points, texts, strict=True):
        free = [place for place in _places(point, text) if place.box.inside(frame) and not crossed(place.box, occupied)]
        label = min(free, key=lambda place: _cost(place, lines), default=None)
        placed.append(label)
        if label is not None:
            occupied.append(label.box)
    return placed


def _cost(label: Label, lines: Sequence[Box]) -> float:
    return label.distance + CROSSED * crossed(label.box, lines)


def crossed(box: Box, others: Iterable[Box]) -> float:
    """The area that a box shares with others."""
    return sum(box.overlap(other) for other in others)


def _places(point: tuple[float, float], text: str) -> Iterator[Label]:
    """The nearest first; of equally near ones the right side, then the left, then above and below."""
    x, y = point
    width = text_width(text)
    for distance in DISTANCES:
        slant = 0.75 * distance
        sides: list[tuple[float, float, Anchor]] = [(distance, 0, "start"), (-distance, 0, "end")]
        sides += [(slant, -slant, "start"), (slant, slant, "start"), (-slant, -slant, "end"), (-slant, slant, "end")]
        sides += [(0, -distance - 3, "middle"), (0, distance + 3, "middle")]
        for right, down, anchor in sides:
            left = {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            at = (x + right, y + down + FONT / 3)
            box = Box(at[0] - left, at[1] - FONT * 0.8, at[0] - left + width, at[1] + FONT * 0.25)
            yield Label(at, anchor, box, distance, (x + right * 0.85, y + down * 0.85) if distance > LEADER else None)
