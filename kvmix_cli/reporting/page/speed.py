"""Throughput by context, a line a plan; with only one context, a bar a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..evaluation import format_estimate as cell
from .axes import FRAME, HEIGHT, Axis, draw_axes
from .drawing import FONT, PANEL, SPREAD, Drawing, Scale, linear_scale, log_scale, shortened
from .look import Look, draw_mark

if TYPE_CHECKING:
    from ...evaluation.collect import Line, LineKey
    from ...evaluation.results import Estimate
    from ...evaluation.tasks.throughput.summary import Outcome, Place

KILO = 1024
BAR, BAR_SPACE, NAMES, NUMBERS = 14.0, 9.0, 150.0, 126.0
NAME_LENGTH = 20


class Curve(NamedTuple):
    """A plan's tokens a second by context; contexts at which it ran out of memory are not there."""

    name: str
    look: Look
    points: Mapping[int, Estimate]


class Sweep(NamedTuple):
    """One kind of speed at one batch.

    Attributes:
        batch: None for the largest that fits.
    """

    title: str
    batch: int | None
    curves: Sequence[Curve]


def sweeps(found: Mapping[Line, Mapping[Place, Outcome]], looks: Mapping[LineKey, Look]) -> list[Sweep]:
    """Decoding at every batch, the largest last, then prompts."""
    batches = {place.batch for places in found.values() for place in places}
    kinds: list[tuple[str, Callable[[Outcome], Estimate | None]]]
    kinds = [("decoding", lambda outcome: outcome.decode), ("prompt", lambda outcome: outcome.prompt)]
    made = [
        Sweep(f"{kind}, {_batch_name(batch)}", batch, list(_curves(found, looks, batch, speed)))
        for kind, speed in kinds
        for batch in sorted(batches, key=lambda batch: (batch is None, batch or 0))
    ]
    return [sweep for sweep in made if sweep.curves]


def speed_plot(sweep: Sweep) -> str:
    """A sweep as SVG."""
    contexts = sorted({context for curve in sweep.curves for context in curve.points})
    return _bars(sweep, contexts[0]) if len(contexts) == 1 else _lines(sweep, contexts)


def _curves(
    found: Mapping[Line, Mapping[Place, Outcome]],
    looks: Mapping[LineKey, Look],
    batch: int | None,
    speed: Callable[[Outcome], Estimate | None],
) -> Iterator[Curve]:
    for line, places in found.items():
        speeds = {place.context: speed(outcome) for place, outcome in places.items() if place.batch == batch}
        points = {context: estimate for context, estimate in sorted(speeds.items()) if estimate is not None}
        if points:
            yield Curve(line.label, looks[line.key], points)


def _batch_name(batch: int | None) -> str:
    return "at each cache's largest batch" if batch is None else f"batch {batch}"


def _lines(sweep: Sweep, contexts: Sequence[int]) -> str:
    drawing = Drawing(PANEL, HEIGHT, f"tokens a second by context: {sweep.title}")
    estimates = [estimate for curve in sweep.curves for estimate in curve.points.values()]
    x = Axis(log_scale(contexts, FRAME.left, FRAME.right, contexts), "context in tokens", _tokens)
    y = Axis(_speed_scale(estimates), "tokens a second, higher is better")
    draw_axes(drawing, x, y)
    for curve in sweep.curves:
        places = [(x.scale.at(context), y.scale.at(each.value)) for context, each in curve.points.items()]
        drawing.path(places, curve.look.stroke)
        for place, (context, estimate) in zip(places, curve.points.items(), strict=True):
            part = drawing.part("point", f"{curve.name} at {context} tokens\n{cell(estimate, '')} tokens a second")
            ends = ((place[0], y.scale.at(estimate.low)), (place[0], y.scale.at(estimate.high)))
            part.line(*ends, f"interval {curve.look.color}")
            draw_mark(part, place, curve.look)
    return drawing.markup()


def _speed_scale(estimates: Sequence[Estimate]) -> Scale:
    """From zero, unless the slowest plans would then lie on the axis."""
    slowest, fastest = min(each.low for each in estimates), max(each.high for each in estimates)
    if fastest > SPREAD * slowest > 0:
        return log_scale([slowest, fastest], FRAME.bottom, FRAME.top)
    return linear_scale([fastest], FRAME.bottom, FRAME.top, zero=True)


def _bars(sweep: Sweep, context: int) -> str:
    each = BAR + BAR_SPACE
    drawing = Drawing(PANEL, each * len(sweep.curves) + BAR_SPACE, f"tokens a second: {sweep.title}")
    fastest = max(curve.points[context].high for curve in sweep.curves)
    scale = linear_scale([fastest], NAMES, PANEL - NUMBERS, zero=True)
    for row, curve in enumerate(sweep.curves):
        estimate, top = curve.points[context], BAR_SPACE + row * each
        middle, base = top + BAR / 2, top + BAR / 2 + FONT / 3
        text = cell(estimate, "")
        part = drawing.part("point", f"{curve.name}\n{text} tokens a second at {context} tokens")
        part.text((NAMES - 8, base), shortened(curve.name, NAME_LENGTH), "name", "end")
        part.rect((NAMES, top), (scale.at(estimate.value) - NAMES, BAR), f"fill {curve.look.color}")
        if estimate.low < estimate.high:
            part.line((scale.at(estimate.low), middle), (scale.at(estimate.high), middle), "whisker")
        part.text((PANEL - 2, base), text, "tick", "end")
    return drawing.markup()


def _tokens(value: float) -> str:
    """`512`, `2K`."""
    return f"{value / KILO:g}K" if value % KILO == 0 else f"{value:g}"
