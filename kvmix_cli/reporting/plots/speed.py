"""Throughput by context, a line a plan; with only one context, a bar a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from ...evaluation.collect import Line
from ...evaluation.readback import LineKey
from ...evaluation.results import Estimate
from ...evaluation.tasks.throughput.summary import Outcome, Place
from ..printable import one_line
from .drawing import Look, describe, drawable, fit_axis, fixed_ticks, hint, styled, tick_text
from .quality import Dot, draw_rows

KILO = 1024
DASHES = ("-", (0, (6, 3)), (0, (2, 2)), (0, (8, 2, 2, 2)))
"""Styles of lines, another one each time the colours are used up."""
UNIT = "tokens a second"


class Curve(NamedTuple):
    """A plan's tokens a second by context; contexts at which it ran out of memory are not there."""

    name: str
    look: Look
    points: Mapping[int, Estimate]


class Sweep(NamedTuple):
    """One kind of speed at one batch."""

    title: str
    curves: Sequence[Curve]

    @property
    def contexts(self) -> list[int]:
        """All contexts, ascending."""
        return sorted({context for curve in self.curves for context in curve.points})


def sweeps(found: Mapping[Line, Mapping[Place, Outcome]], looks: Mapping[LineKey, Look]) -> list[Sweep]:
    """Return decoding at every batch, the largest that fits last, then prompts."""
    batches = {place.batch for places in found.values() for place in places}
    kinds: list[tuple[str, Callable[[Outcome], Estimate | None]]]
    kinds = [("decoding", lambda outcome: outcome.decode), ("prompt", lambda outcome: outcome.prompt)]
    made = [
        Sweep(f"{kind}, {_batch_name(batch)}", list(_curves(found, looks, batch, speed)))
        for kind, speed in kinds
        for batch in sorted(batches, key=lambda batch: (batch is None, batch or 0))
    ]
    return [sweep for sweep in made if sweep.curves]


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
            yield Curve(one_line(line.label), looks[line.key], points)


def _batch_name(batch: int | None) -> str:
    return "at each cache's largest batch" if batch is None else f"batch {batch}"


@styled()
def draw_speed(axes: Axes, sweep: Sweep) -> None:
    """Draw a sweep: lines with intervals over the contexts, or bars at the only one."""
    contexts = sweep.contexts
    if len(contexts) == 1:
        dots = [
            Dot(each.name, 0, each.points[contexts[0]], each.look, _speed(each, contexts[0])) for each in sweep.curves
        ]
        draw_rows(axes, dots, f"{UNIT} at {_tokens(contexts[0])} tokens", zero=True)
        return
    estimates = [estimate for curve in sweep.curves for estimate in curve.points.values()]
    describe(axes, x="context in tokens", y=f"{UNIT}, higher is better")
    fit_axis(axes.yaxis, [drawable(end) for each in estimates for end in (each.low, each.high)], zero=True)
    axes.set_xscale("log")
    axes.set_xlim(contexts[0] / 1.08, contexts[-1] * 1.08)
    fixed_ticks(axes.xaxis, contexts, 0.14, FuncFormatter(_tokens))
    for curve in sweep.curves:
        values = [drawable(each.value) for each in curve.points.values()]
        dashes = DASHES[max(curve.look.number, 0) // 7 % len(DASHES)]
        axes.plot(list(curve.points), values, color=curve.look.color, linewidth=2, linestyle=dashes)
        for context, estimate in curve.points.items():
            ends = [drawable(estimate.low), drawable(estimate.high)]
            axes.plot([context, context], ends, color=curve.look.color, alpha=0.6, linewidth=1.3)
            (point,) = axes.plot(context, drawable(estimate.value), curve.look.marker, color=curve.look.color)
            hint(point, f"{curve.name} at {context} tokens\n{_speed(curve, context)} {UNIT}")


def _speed(curve: Curve, context: int) -> str:
    """Return `64.2 [60, 70]`."""
    from ..tables.evaluation import format_estimate

    return format_estimate(curve.points[context], "")


def _tokens(value: float, _: object = None) -> str:
    """Return `512`, `2K`."""
    return f"{value / KILO:g}K" if value % KILO == 0 else tick_text(value)
