"""Quality against what the cache takes: plans with their intervals, and the best there is for every size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from ..evaluation import format_estimate as cell
from .axes import FRAME, HEIGHT, Axis, Formatter, draw_axes, draw_level_name
from .drawing import PANEL, Drawing, Scale, fitting_scale, log_scale, shortened, tick_text
from .front import comparable, front
from .labels import Box, place_labels
from .look import Look, draw_mark
from .tables import column_name

if TYPE_CHECKING:
    from ...evaluation.collect import Group, LineKey, Measurement
    from ...evaluation.results import Estimate, Metric

Place = tuple[float, float]
UNQUANTIZED = "unquantized"
BIT_TICKS = (2.0, 4.0, 8.0, 16.0, 1.0, 3.0, 6.0, 12.0, 5.0, 2.5, 3.5, 4.5, 7.0, 10.0)
MOST_LABELS = 16
"""With more plans, only the best ones are named; the others have hints."""
LABEL = 22
"""Characters of a name in a plot."""
CAP = 3.0
BYTES = "measured_bytes"
SIZES = ("KiB", "MiB", "GiB", "TiB")


class Cost(NamedTuple):
    """What a plan takes, by line.

    Attributes:
        title: of the axis.
        spread: whether equal factors should be equally long.
    """

    title: str
    of: Mapping[LineKey, float]
    spread: bool = False

    def scale(self, values: list[float]) -> Scale:
        """The axis for some of the plans."""
        if self.spread:
            return log_scale(values, FRAME.left, FRAME.right, BIT_TICKS)
        return fitting_scale(values, FRAME.left, FRAME.right)


class Dot(NamedTuple):
    """A plan's point, in places of the drawing."""

    name: str
    hint: str
    look: Look
    at: Place
    interval: tuple[float, float]


def stored_bits(group: Group) -> Cost:
    """Of the lines for which they can be told."""
    return Cost("stored bits", {line.key: line.stored_bits for line in group.lines if line.stored_bits}, spread=True)


def cache_bytes(memory: Measurement) -> Cost:
    """As a `memory` measurement has them."""
    found = {k: run.row.metrics[BYTES].value for k, run in memory.runs.items() if BYTES in run.row.metrics}
    power = 1
    while max(found.values(), default=0) >= 1024 ** (power + 1) and power < len(SIZES):
        power += 1
    return Cost(f"cache in {SIZES[power - 1]}", {key: size / 1024**power for key, size in found.items()})


def quality_plot(
    group: Group, measurement: Measurement, metric: Metric, cost: Cost, looks: Mapping[LineKey, Look]
) -> str | None:
    """The plot as SVG; None if there is nothing in it."""
    found = [(line, each) for line, each in comparable(group, measurement, metric) if line.key in cost.of]
    if not found:
        return None
    reference = _reference(group, measurement, metric)
    x = Axis(cost.scale([cost.of[line.key] for line, _ in found]), cost.title)
    y = Axis(
        _quality_scale([each for _, each in found], reference), f"{_name(metric)}, {_better(metric)}", _ticks(metric)
    )
    dots = [
        Dot(
            name=line.label,
            hint=f"{line.label}\n{_short(metric)} {cell(each, metric.unit)}\n{cost.title} {cost.of[line.key]:.4g}",
            look=looks[line.key],
            at=(x.scale.at(cost.of[line.key]), y.scale.at(each.value)),
            interval=(y.scale.at(each.low), y.scale.at(each.high)),
        )
        for line, each in found
    ]
    best = front([(cost.of[line.key], each.value) for line, each in found], metric.higher_is_better)
    drawing = Drawing(PANEL, HEIGHT, f"{column_name(metric)} against {cost.title}")
    draw_axes(drawing, x, y)
    _draw_dots(drawing, dots, best, None if reference is None else y.scale.at(reference))
    return drawing.markup()


def _draw_dots(drawing: Drawing, dots: Sequence[Dot], best: Sequence[int], level: float | None) -> None:
    """The points with their intervals and names; `best` has the indices of the front, `level` is the reference's."""
    places = [dot.at for dot in dots]
    points = [Box.around(place) for place in places]
    if level is not None:
        drawing.line((FRAME.left, level), (FRAME.right, level), "level")
    lines = _draw_front(drawing.part(hint="the best for every size"), [places[index] for index in best])
    for dot in dots:
        part = drawing.part(hint=dot.hint)
        lines += _draw_interval(part, dot)
        draw_mark(part, dot.at, dot.look)
    order = [*best, *(index for index in range(len(dots)) if index not in best)]
    named = order if len(dots) <= MOST_LABELS else best
    taken = [points[index] for index in order if index not in named]
    if level is not None:
        taken.append(draw_level_name(drawing, level, UNQUANTIZED, points, lines))
        lines.append(Box.along((FRAME.left, level), (FRAME.right, level)))
    _draw_names(drawing, [dots[index] for index in named], taken, lines)


def _reference(group: Group, measurement: Measurement, metric: Metric) -> float | None:
    """The unquantized cache's number; an increase over it is zero by definition."""
    if metric.plans_only:
        return 0.0 if "increase" in metric.name else None
    estimates = [measurement.estimate(line, metric.name) for line in group.lines if line.is_reference]
    return next((estimate.value for estimate in estimates if estimate is not None), None)


def _quality_scale(estimates: Sequence[Estimate], reference: float | None) -> Scale:
    values = [number for each in estimates for number in (each.value, each.low, each.high)]
    return fitting_scale([*values, *([] if reference is None else [reference])], FRAME.bottom, FRAME.top)


def _draw_front(part: Drawing, places: Sequence[Place]) -> list[Box]:
    """Stairs: between two plans the smaller one is still the best that fits. Gives where they are."""
    corners = [places[0]]
    for (_, before), (x, y) in pairwise(places):
        corners += [(x, before), (x, y)]
    corners.append((FRAME.right, places[-1][1]))
    part.path(corners, "stairs")
    return [Box.along(*ends) for ends in pairwise(corners)]


def _draw_interval(part: Drawing, dot: Dot) -> list[Box]:
    """Gives where it is."""
    (x, _), (low, high) = dot.at, dot.interval
    if low == high:
        return []
    for start, end in (((x, low), (x, high)), *(((x - CAP, end), (x + CAP, end)) for end in dot.interval)):
        part.line(start, end, f"interval {dot.look.color}")
    return [Box.along((x, low), (x, high))]


def _draw_names(drawing: Drawing, dots: Sequence[Dot], taken: list[Box], lines: list[Box]) -> None:
    """In this order of precedence; names that find no room are left to the hints."""
    frame = Box(FRAME.left, FRAME.top - 10, FRAME.right + 8, FRAME.bottom)
    texts = [shortened(dot.name, LABEL) for dot in dots]
    labels = place_labels([dot.at for dot in dots], texts, frame, taken, lines)
    for dot, text, label in zip(dots, texts, labels, strict=True):
        if label is None:
            continue
        if label.leader is not None:
            drawing.line(dot.at, label.leader, "leader")
        drawing.text(label.at, text, "name", label.anchor)


def _name(metric: Metric) -> str:
    """`perplexity increase in %`, not `perplexity increase percent in %`."""
    return f"{_short(metric)} in {metric.unit}" if metric.unit else _short(metric)


def _short(metric: Metric) -> str:
    """`perplexity increase`."""
    return column_name(metric).removesuffix(" percent")


def _better(metric: Metric) -> str:
    return "higher is better" if metric.higher_is_better else "lower is better"


def _ticks(metric: Metric) -> Formatter:
    """An increase has a sign."""
    return (lambda number: f"{'+' if number > 0 else ''}{tick_text(number)}") if metric.plans_only else tick_text
