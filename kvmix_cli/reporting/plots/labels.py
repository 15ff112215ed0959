"""Names of points, placed so that they hide neither the points nor each other. Importing this loads matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ..printable import shortened
from .drawing import POINTS, SOFT, drawable, figure_of, settle

Span = tuple[tuple[float, float], tuple[float, float]]
NAME = 24
"""Characters of a name in a picture."""
RADIUS = 5.0
"""Half the side of the square that a point takes, in points."""
DISTANCES = (8.0, 16.0, 28.0, 42.0)
"""Distances of a name from its point, in points."""
SHARE = {"left": 0.0, "center": 0.5, "right": 1.0}
"""Share of a name that is to the left of where it is aligned."""
NEAR = 13.0
"""A name farther away is joined to its point by a line."""


def name_points(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    lines: Sequence[Span] = (),
    texts: Sequence[Text] = (),
) -> list[int]:
    """Write names beside the first points, these first.

    Args:
        points: all that no name may hide, those with names first.
        lines: corners of upright and level lines, on which a name stands only if there is no other room.
        texts: what no name may hide beside the points.

    Returns:
        Indices of the names for which there is no room.
    """
    if not points:
        return []
    figure = figure_of(axes)
    settle(axes)
    renderer, scale = FigureCanvasAgg(figure).get_renderer(), figure.dpi / POINTS
    frame = axes.get_window_extent(renderer)
    places = axes.transData.transform([(drawable(x), drawable(y)) for x, y in points])
    radius = RADIUS * scale
    taken = [Bbox.from_extents(x - radius, y - radius, x + radius, y + radius) for x, y in places]
    taken += [text.get_window_extent(renderer) for text in texts]
    crossed = [_covered(axes, line) for line in lines]
    left_out = []
    for index, (point, name) in enumerate(zip(points, names, strict=False)):
        text, offset = shortened(name, NAME), "offset points"
        arrow = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
        label = axes.annotate(text, point, xytext=(0, 0), textcoords=offset, arrowprops=arrow, va="center", zorder=5)
        label.set_in_layout(False)
        size = Text.get_window_extent(label, renderer)
        found = _place(places[index], (size.width, size.height), frame, taken, crossed, scale)
        if found is None:
            label.remove()
            left_out.append(index)
            continue
        right, up, side, box = found
        label.set(position=(right, up), ha=side)
        if label.arrow_patch is not None:
            label.arrow_patch.set_visible(math.hypot(right, up) > NEAR)
        taken.append(box)
    return left_out


def _place(
    point: tuple[float, float],
    size: tuple[float, float],
    frame: Bbox,
    taken: Sequence[Bbox],
    lines: Sequence[Bbox],
    scale: float,
) -> tuple[float, float, str, Bbox] | None:
    """Return offset, alignment and place of a name: the nearest free one, off the lines if possible; None without one.

    Args:
        point, size, frame, taken, lines: in pixels, of which a point of length has `scale`.
    """
    width, height = size
    for avoided in ([*taken, *lines], taken):
        for right, up, side in (each for distance in DISTANCES for each in _sides(distance)):
            left = point[0] + right * scale - width * SHARE[side]
            bottom = point[1] + up * scale - height / 2
            box = Bbox.from_bounds(left, bottom, width, height)
            is_inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if is_inside and not box.count_overlaps(avoided):
                return right, up, side, box
    return None


def _sides(distance: float) -> Iterator[tuple[float, float, str]]:
    """Offsets and alignments at a distance: beside the point, then aslant, then above and below."""
    slant = 0.75 * distance
    yield from ((distance, 0, "left"), (-distance, 0, "right"))
    for up in (slant, -slant):
        yield from ((slant, up, "left"), (-slant, up, "right"))
    yield from ((0, distance, "center"), (0, -distance, "center"))


def _covered(axes: Axes, line: Span) -> Bbox:
    """Return what a line covers, in pixels."""
    (x0, y0), (x1, y1) = axes.transData.transform([(drawable(x), drawable(y)) for x, y in line])
    return Bbox.from_extents(min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1)
