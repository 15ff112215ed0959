"""Quality against what the cache takes: plans with their intervals, and the best there is for every size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

from ...evaluation.results import Estimate
from ..comparison import front
from ..printable import shortened
from .drawing import (
    CARD,
    INK,
    POINTS,
    SOFT,
    Look,
    describe,
    drawable,
    figure_of,
    fit_axis,
    fixed_ticks,
    hint,
    settle,
    signed,
    styled,
    tick_text,
)
from .labels import Span, name_points

BIT_TICKS = (2.0, 4.0, 8.0, 16.0, 3.0, 1.0, 6.0, 12.0, 5.0, 2.5, 3.5, 4.5, 7.0, 10.0)
ALONE = 1.5
"""Factor of bits to both sides of the only plans there are."""
MARGIN = 0.1
"""Share of the axes that the name of a line takes, about."""
ROW = 36.0
"""Height of a row of `draw_rows`, in points."""
MOST = 10
"""Plans that a plot names; among more, it names the best ones only."""
APART = 12.0
"""Least distance between the name and the number of a row, in points."""


class Dot(NamedTuple):
    """A plan's point.

    Attributes:
        cost: stored bits, or bytes in the unit of the axis.
        text: its numbers in words.
    """

    name: str
    cost: float
    quality: Estimate
    look: Look
    text: str = ""


class Quality(NamedTuple):
    """A number that plans are compared by.

    Attributes:
        reference: the unquantized cache's number; None if it is not known.
        increase: whether it is a change against the unquantized cache, so that its ticks have a sign.
    """

    title: str
    higher_is_better: bool
    reference: float | None
    increase: bool = False


@styled()
def draw_quality(axes: Axes, dots: Sequence[Dot], quality: Quality, cost: str) -> list[str]:
    """Draw points with intervals and names, the front as stairs, and the unquantized cache as a dashed line.

    Args:
        cost: title of the level axis; stored bits are spread out, everything else is not.

    Returns:
        Names that are not there: of plans that are not the best among many, and those for which there was no room.
    """
    low, high, middle = ([drawable(getattr(dot.quality, end)) for dot in dots] for end in ("low", "high", "value"))
    costs = [drawable(dot.cost) for dot in dots]
    reference = None if quality.reference is None else drawable(quality.reference)
    direction = "higher is better" if quality.higher_is_better else "lower is better"
    describe(axes, x=cost, y=f"{quality.title}, {direction}")
    values = [*low, *high, *([] if reference is None else [reference])]
    fit_axis(axes.yaxis, values, FuncFormatter(signed if quality.increase else tick_text))
    _fit_cost(axes, costs, spread="bits" in cost)
    best = front(list(zip(costs, middle, strict=True)), quality.higher_is_better)
    lines = _draw_front(axes, [(costs[index], middle[index]) for index in best])
    for dot, x, y, bottom, top in zip(dots, costs, middle, low, high, strict=True):
        axes.plot([x, x], [bottom, top], color=dot.look.color, linewidth=1.3, alpha=0.6, marker="_", markersize=6)
        lines.append(((x, bottom), (x, top)))
        (point,) = axes.plot(x, y, dot.look.marker, color=dot.look.color, markersize=7, zorder=4)
        hint(point, f"{dot.name}\n{quality.title} {dot.text}\n{cost} {dot.cost:.4g}")
    texts = list[Text]()
    if reference is not None:
        line, text = _draw_level(axes, reference, list(zip(costs, middle, strict=True)))
        lines.append(line)
        texts.append(text)
    order = [*best, *(index for index in range(len(dots)) if index not in best)]
    named = order if len(dots) <= MOST else best
    places, names = [(costs[index], middle[index]) for index in order], [dots[index].name for index in named]
    without = name_points(axes, places, names, lines, texts)
    return [*(names[index] for index in without), *(dots[index].name for index in order[len(named) :])]


def _fit_cost(axes: Axes, costs: Sequence[float], spread: bool) -> None:
    low, high = min(costs), max(costs)
    if not spread:
        fit_axis(axes.xaxis, costs)
        return
    axes.set_xscale("log")
    edge = ALONE if high < ALONE * low else (high / low) ** 0.08
    axes.set_xlim(low / edge, high * edge)
    fixed_ticks(axes.xaxis, [*BIT_TICKS, low, high], 0.11, FuncFormatter(tick_text))


def _draw_front(axes: Axes, places: Sequence[tuple[float, float]]) -> list[Span]:
    """Draw stairs: between two plans the smaller one is still the best that fits. Return their parts."""
    corners = [places[0]]
    for (_, before), (x, y) in pairwise(places):
        corners += [(x, before), (x, y)]
    corners.append((axes.get_xlim()[1], places[-1][1]))
    (stairs,) = axes.plot(*zip(*corners, strict=True), color=SOFT, linewidth=2, alpha=0.4, zorder=1)
    hint(stairs, "the best for every size")
    return list(pairwise(corners))


def _draw_level(axes: Axes, reference: float, places: Sequence[tuple[float, float]]) -> tuple[Span, Text]:
    """Draw the unquantized cache's line, named where fewest points are. Return both."""
    left, right = axes.get_xlim()
    axes.axhline(reference, color=SOFT, linewidth=1, linestyle=(0, (5, 4)), zorder=1)
    spots = (axes.transData + axes.transAxes.inverted()).transform([(left, reference), *places])
    height = spots[0][1]
    sides = [(x, up) for up in (1, -1) for x in (0, 1) if 0 < height + up * MARGIN < 1]
    side, up = min(sides, key=lambda side: sum(_is_near(spot, side, height) for spot in spots[1:]))
    text = axes.annotate(
        "unquantized",
        (side, reference),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3 * up),
        textcoords="offset points",
        ha=("left", "right")[side],
        va="bottom" if up > 0 else "top",
        color=SOFT,
    )
    text.set_in_layout(False)
    return ((left, reference), (right, reference)), text


def _is_near(spot: Sequence[float], side: tuple[int, int], height: float) -> bool:
    """Return whether a point, as shares of the axes, is about where the line's name would be."""
    return abs(spot[0] - side[0]) < 0.4 and -0.03 < (spot[1] - height) * side[1] < MARGIN


@styled()
def draw_rows(axes: Axes, dots: Sequence[Dot], title: str, level: float | None = None, *, zero: bool = False) -> None:
    """Draw a row a plan with its name and number above its interval: room for any number of plans.

    Args:
        level: the unquantized cache's number, a dashed line.
        zero: draw amounts, as bars from zero.
    """
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    describe(axes, x=title if level is None else f"{title}\ndashed: unquantized")
    ends = [drawable(number) for dot in dots for number in (dot.quality.low, dot.quality.high)]
    increase = level == 0
    values = [*ends, *([] if level is None else [drawable(level)])]
    fit_axis(axes.xaxis, values, FuncFormatter(signed if increase else tick_text), zero=zero)
    axes.set_ylim(len(dots), 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    settle(axes)
    renderer = FigureCanvasAgg(figure_of(axes)).get_renderer()
    room = axes.get_window_extent(renderer).width - APART * figure_of(axes).dpi / POINTS
    for row, dot in enumerate(dots):
        low, high, value = (drawable(getattr(dot.quality, end)) for end in ("low", "high", "value"))
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "in_layout": False}
        number = axes.annotate(dot.text, (1, row + 0.3), ha="right", color=SOFT, **place)
        name = axes.annotate(dot.name, (0, row + 0.3), **place)
        wide, free = (each.get_window_extent(renderer).width for each in (name, number))
        if wide > room - free:
            name.set_text(shortened(dot.name, max(8, int(len(dot.name) * (room - free) / wide) - 1)))
        if level is not None:
            axes.plot([drawable(level)] * 2, [row + 0.5, row + 0.9], color=SOFT, linewidth=1, linestyle=(0, (3, 2)))
        if zero:
            axes.barh(row + 0.7, value, 0.3, color=dot.look.color)
        axes.plot([low, high], [row + 0.7] * 2, color=INK if zero else dot.look.color, linewidth=1.3, marker="|")
        if not zero:
            axes.plot(value, row + 0.7, dot.look.marker, color=dot.look.color, markersize=7, markeredgecolor=CARD)
