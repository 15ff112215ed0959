"""The page's figures, in panels under a heading: a part without data is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from matplotlib.axes import Axes

from ...evaluation.collect import Group, Line, Measurement
from ...evaluation.grid import RecallGrid, grid
from ...evaluation.readback import LineKey
from ...evaluation.results import Estimate, Metric
from ...evaluation.tasks.throughput.summary import outcomes
from ..comparison import comparable, headline, reference_number, short_name
from ..plots.drawing import Look, figure_of, page_axes, settle, svg
from ..plots.heat_map import counted, draw_heat_map
from ..plots.plans import draw_bits
from ..plots.quality import ROW, Dot, Quality, draw_quality, draw_rows
from ..plots.speed import Sweep, draw_speed, sweeps
from ..printable import one_line
from ..tables.evaluation import format_estimate
from ..tables.results import bits

if TYPE_CHECKING:
    from markupsafe import Markup

T = TypeVar("T")
Looks = Mapping[LineKey, Look]
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)
"""Errors of reading records that are not what a task writes."""
BYTES = "measured_bytes"
SIZES = ("KiB", "MiB", "GiB", "TiB")
QUALITY, BITS, SPEED = 270.0, 165.0, 250.0
"""Heights of figures, in points."""
FOOT, HEAT_ROW, HEAT_WIDTH = 66.0, 24.0, 250.0
"""Height of an axis below its rows, height of a row of a heat map, and width of its rows, in points."""


class Panel(NamedTuple):
    """One plot; `look` is that of the plan it is about, if it is about one."""

    title: str
    svg: Markup
    look: Look | None = None
    note: str = ""
    caption: str = ""


class Figures(NamedTuple):
    """Panels of one kind; `key` names the looks in them."""

    title: str
    panels: list[Panel]
    key: Sequence[tuple[str, Look]] = ()


class Cost(NamedTuple):
    """Cost of every line as the title of an axis and as numbers; `told` says where they come from."""

    title: str
    of: Mapping[LineKey, float]
    told: str = ""

    @property
    def is_first(self) -> bool:
        """Return whether this is the cost beside which every plan is named with its number."""
        return not self.told


def looks(group: Group) -> dict[LineKey, Look]:
    """Return the look of every line of a group."""
    plans = [line.key for line in group.lines if not line.is_reference]
    found = {line.key: Look(-1) for line in group.lines if line.is_reference}
    return found | {key: Look(index) for index, key in enumerate(plans)}


def quality_figures(group: Group, looks: Looks, wanted: str | None) -> Iterator[Figures]:
    """Draw each measurement's number against stored bits; the first also against bytes, if they were measured."""
    panels: list[Panel] = []
    for measurement in group.measurements:
        metric = headline(measurement, wanted)
        if metric is None:
            continue
        for cost in _costs(group, measurement, with_bytes=not panels):
            panels += _quality_panels(group, measurement, metric, cost, looks)
    if panels:
        yield Figures("Quality against what the cache takes", panels)


def _quality_panels(
    group: Group, measurement: Measurement, metric: Metric, cost: Cost, looks: Looks
) -> Iterator[Panel]:
    """Draw one number against one cost, and a row a plan below if some names have no room in it."""
    found = [(line, each) for line, each in comparable(group, measurement, metric) if line.key in cost.of]
    if not found:
        return
    dots = [_dot(line, each, metric, cost, looks[line.key]) for line, each in found]
    title = f"{short_name(metric)} in {metric.unit}" if metric.unit else short_name(metric)
    level = reference_number(group, measurement, metric)
    axes = page_axes(QUALITY)
    unnamed = draw_quality(axes, dots, Quality(title, metric.higher_is_better, level, metric.plans_only), cost.title)
    label = f"{short_name(metric)} against {cost.title}"
    about, caption = f"{measurement.title} against {cost.title}", measurement.description + cost.told
    yield Panel(about, _drawn(axes, label), caption=caption)
    if unnamed and cost.is_first:
        axes = page_axes(ROW * len(dots) + FOOT)
        draw_rows(axes, dots, title, level)
        label = f"{short_name(metric)} of every plan"
        yield Panel(f"{measurement.title} of every plan", _drawn(axes, label))


def _dot(line: Line, estimate: Estimate, metric: Metric, cost: Cost, look: Look) -> Dot:
    return Dot(
        one_line(line.label),
        cost.of[line.key],
        estimate,
        look,
        format_estimate(estimate, metric.unit).replace(" %", ""),
    )


def _costs(group: Group, measurement: Measurement, with_bytes: bool) -> Iterator[Cost]:
    """Return stored bits, then bytes from the task that counted those of most lines, at least two."""
    yield Cost("stored bits", {line.key: line.stored_bits for line in group.lines if line.stored_bits})
    counting = [each for each in group.measurements if any(metric.name == BYTES for metric in each.metrics)]
    common = [len(each.runs.keys() & measurement.runs.keys()) for each in counting]
    if with_bytes and max(common, default=0) > 1:
        memory = counting[common.index(max(common))]
        found = {key: run.row.metrics[BYTES].value for key, run in memory.runs.items() if BYTES in run.row.metrics}
        power = 1
        while max(found.values(), default=0) >= 1024 ** (power + 1) and power < len(SIZES):
            power += 1
        sizes = {key: size / 1024**power for key, size in found.items()}
        yield Cost(f"cache in {SIZES[power - 1]}", sizes, f"; bytes as {memory.title} counted them")


def bits_figures(group: Group, looks: Looks) -> Iterator[Figures]:
    """Draw every plan's widths."""
    panels = []
    for line in group.lines:
        if line.layers:
            nominal, stored = bits(line)
            axes = page_axes(BITS)
            draw_bits(axes, line.layers)
            label = f"bits by layer of {line.label}: {line.widths}"
            note = f"{nominal} nominal, {stored} stored"
            panels.append(Panel(line.label, _drawn(axes, label), looks[line.key], note))
    if panels:
        yield Figures("Bits by layer", panels)


def heat_figures(group: Group, looks: Looks, faults: list[str]) -> Iterator[Figures]:
    """Draw what was recalled from where, a map a line, for every task that knows."""
    for measurement in group.measurements:
        found = {line: each for line, each in _read(group, measurement, grid, faults).items() if each is not None}
        if found:
            panels = [_heat_panel(measurement, line, each, looks[line.key]) for line, each in found.items()]
            title = f"{measurement.title}: what was recalled, by where it stood (bright: all, dark: nothing)"
            yield Figures(title, panels)


def _heat_panel(measurement: Measurement, line: Line, found: RecallGrid, look: Look) -> Panel:
    axes = page_axes(HEAT_ROW * len(found.rows) + FOOT)
    draw_heat_map(axes, found, HEAT_WIDTH)
    label = f"{measurement.title} of {line.label} by {found.down} and {found.across}"
    return Panel(line.label, _drawn(axes, label), look, counted(found))


def speed_figures(group: Group, looks: Looks, faults: list[str]) -> Iterator[Figures]:
    """Draw throughput by context."""
    for measurement in group.measurements:
        if measurement.timed:
            found = sweeps(_read(group, measurement, outcomes, faults), looks)
            key = {curve.name: curve.look for sweep in found for curve in sweep.curves}
            if found:
                panels = [_speed_panel(sweep) for sweep in found]
                yield Figures(f"{measurement.title} by context", panels, list(key.items()))


def _speed_panel(sweep: Sweep) -> Panel:
    is_bars = len(sweep.contexts) == 1
    axes = page_axes(ROW * len(sweep.curves) + FOOT if is_bars else SPEED)
    draw_speed(axes, sweep)
    what = "tokens a second" if is_bars else "tokens a second by context"
    return Panel(sweep.title, _drawn(axes, f"{what}: {sweep.title}"))


def _read(
    group: Group, measurement: Measurement, read: Callable[[Sequence[Any]], T], faults: list[str]
) -> dict[Line, T]:
    """Read the records of every measured line; those that are not of this task's kind become a fault."""
    found = {}
    for line in group.lines:
        row = measurement.row(line)
        if row is not None and row.error is None and row.records:
            try:
                found[line] = read(row.records)
            except MALFORMED:
                folder = measurement.runs[line.key].folder
                faults.append(f"{folder}: its samples are not what {measurement.task} writes")
    return found


def _drawn(axes: Axes, label: str) -> Markup:
    """Return the SVG of a figure; whatever in it came from files is escaped already."""
    from markupsafe import Markup

    settle(axes)
    return Markup(svg(figure_of(axes), label))
