"""The page's figures, in panels under a heading: a part without data is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from .drawing import Drawing
from .front import headline
from .heat import SHADES, heat_map
from .look import SWATCH, Look
from .markup import point, raw
from .quality import BYTES, Cost, cache_bytes, quality_plot, stored_bits
from .speed import speed_plot, sweeps
from .strips import bits_strips, used_bits
from .tables import bits

if TYPE_CHECKING:
    from markupsafe import Markup

    from ...evaluation.collect import Group, Line, LineKey, Measurement
    from ...evaluation.results import Record

T = TypeVar("T")
Looks = Mapping["LineKey", Look]
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What reading records raises if they are not what a task writes."""


class Panel(NamedTuple):
    """One plot; `point` is that of the plan it is about, if it is about one."""

    title: str
    svg: Markup
    point: Markup | str = ""
    note: str = ""
    caption: str = ""


class Key(NamedTuple):
    """What a colour or a point means."""

    svg: Markup
    text: str


class Figures(NamedTuple):
    """Panels of one kind; many of the small ones stand side by side."""

    title: str
    panels: list[Panel]
    keys: Sequence[Key] = ()
    small: bool = False


def quality_figures(group: Group, looks: Looks, wanted: str | None) -> Iterator[Figures]:
    """Each measurement's number against stored bits; the first also against bytes, if they were measured."""
    panels: list[Panel] = []
    for measurement in group.measurements:
        metric = headline(measurement, wanted)
        if metric is None:
            continue
        for cost, told in _costs(group, measurement, with_bytes=not panels):
            if svg := quality_plot(group, measurement, metric, cost, looks):
                caption = f"{measurement.description}{told}"
                panels.append(Panel(f"{measurement.title} against {cost.title}", raw(svg), caption=caption))
    if panels:
        yield Figures("Quality against what the cache takes", panels)


def bits_figures(group: Group, looks: Looks) -> Iterator[Figures]:
    """Every plan's widths."""
    panels = []
    for line in group.lines:
        if line.layers:
            nominal, stored = bits(line)
            svg = raw(bits_strips(line.layers, f"bits by layer of {line.label}"))
            panels.append(Panel(line.label, svg, point(looks[line.key]), f"{nominal} nominal, {stored} stored"))
    if panels:
        keys = [Key(_patch(f"b{width}"), f"{width} bits") for width in used_bits(group.lines)]
        yield Figures("Bits by layer", panels, keys)


def heat_figures(group: Group, looks: Looks, faults: list[str]) -> Iterator[Figures]:
    """What was recalled from where, a map a line, for every task that knows."""
    from ...evaluation.grid import grid

    shades = ((0, "nothing recalled"), (SHADES // 2, "half"), (SHADES, "everything"))
    keys = [Key(_patch(f"h{shade}"), text) for shade, text in shades]
    for measurement in group.measurements:
        panels = []
        for line, found in _read(group, measurement, grid, faults).items():
            if found is not None:
                cells = [cell for row in found.cells for cell in row if cell]
                told = f"{sum(cell.recalled for cell in cells)} of {sum(cell.count for cell in cells)} recalled"
                label = f"{measurement.title} of {line.label} by {found.down} and {found.across}"
                panels.append(Panel(line.label, raw(heat_map(found, label)), point(looks[line.key]), told))
        if panels:
            yield Figures(f"{measurement.title}: what was recalled, by where it stood", panels, keys, small=True)


def speed_figures(group: Group, looks: Looks, faults: list[str]) -> Iterator[Figures]:
    """Throughput by context."""
    from ...evaluation.tasks.throughput.summary import outcomes

    for measurement in group.measurements:
        if not measurement.timed:
            continue
        found = sweeps(_read(group, measurement, outcomes, faults), looks)
        named = {curve.name: curve.look for sweep in found for curve in sweep.curves}
        keys = [Key(point(look), name) for name, look in named.items()]
        if found:
            panels = [Panel(sweep.title, raw(speed_plot(sweep))) for sweep in found]
            yield Figures(f"{measurement.title} by context", panels, keys)


def _costs(group: Group, measurement: Measurement, with_bytes: bool) -> Iterator[tuple[Cost, str]]:
    """What plans take, and whence it is known; bytes from the task that counted those of most lines, at least two."""
    yield stored_bits(group), ""
    counted = [each for each in group.measurements if any(metric.name == BYTES for metric in each.metrics)]
    common = [len(each.runs.keys() & measurement.runs.keys()) for each in counted]
    if with_bytes and max(common, default=0) > 1:
        memory = counted[common.index(max(common))]
        yield cache_bytes(memory), f"; bytes as {memory.title} counted them"


def _read(
    group: Group, measurement: Measurement, read: Callable[[Sequence[Record]], T], faults: list[str]
) -> dict[Line, T]:
    """What the records of every measured line say; those that are not of this task's kind are a fault."""
    found = {}
    for line in group.lines:
        row = measurement.row(line)
        if row is not None and row.error is None and row.records:
            try:
                found[line] = read(row.records)
            except MALFORMED:
                faults.append(
                    f"{measurement.runs[line.key].folder}: its samples are not what {measurement.task} writes"
                )
    return found


def _patch(style: str) -> Markup:
    """A patch of a colour, for a key."""
    drawing = Drawing(SWATCH, SWATCH, "")
    drawing.rect((0, 0), (SWATCH, SWATCH), style)
    return raw(drawing.markup())
