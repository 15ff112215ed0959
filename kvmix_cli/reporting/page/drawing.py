"""Drawings as SVG inside a page: its style sheet gives them their colours, so that they follow the reader's theme.

Lengths are in units of a drawing's view box; a panel is as wide as fits a phone and is scaled up from there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree.ElementTree import Element, SubElement, tostring

PANEL = 440
FONT = 12.0
CHARACTER = 0.6
"""Mean width of a character, in font sizes."""
LONG, LONGEST = 1e4, 1e12
"""Numbers that are written with all their digits."""

Anchor = Literal["start", "middle", "end"]


class Drawing:
    """An SVG element with what plots are made of; texts are escaped by the library that writes it."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height = width, height
        size = f"0 0 {number(width)} {number(height)}"
        self._root = Element("svg", {"viewBox": size, "role": "img", "aria-label": label})
        self._into = self._root

    def markup(self) -> str:
        """The element as text."""
        return tostring(self._root, encoding="unicode")

    def part(self, style: str = "", hint: str = "") -> Drawing:
        """A group of shapes with a style of their own, and a hint that is shown under the pointer."""
        part = Drawing.__new__(Drawing)
        part.width, part.height, part._root = self.width, self.height, self._root
        part._into = SubElement(self._into, "g", {"class": style} if style else {})
        if hint:
            SubElement(part._into, "title").text = hint
        return part

    def line(self, start: tuple[float, float], end: tuple[float, float], style: str) -> None:
        """A straight line."""
        places = zip(("x1", "y1", "x2", "y2"), (*start, *end), strict=True)
        self._add("line", style, {name: number(at) for name, at in places})

    def path(self, points: Iterable[tuple[float, float]], style: str, closed: bool = False) -> None:
        """A line through points, or the shape that it surrounds."""
        steps = " L".join(f"{number(x)} {number(y)}" for x, y in points)
        self._add("path", style, {"d": f"M{steps}{'Z' if closed else ''}"})

    def rect(self, corner: tuple[float, float], size: tuple[float, float], style: str) -> None:
        """A rectangle, by its upper left corner."""
        places = zip(("x", "y", "width", "height"), (*corner, *size), strict=True)
        self._add("rect", style, {name: number(at) for name, at in places})

    def circle(self, center: tuple[float, float], radius: float, style: str) -> None:
        """A disc."""
        self._add("circle", style, {"cx": number(center[0]), "cy": number(center[1]), "r": number(radius)})

    def text(self, at: tuple[float, float], text: str, style: str = "", anchor: Anchor = "start") -> None:
        """A line of text on its base line."""
        places = {"x": number(at[0]), "y": number(at[1])}
        if anchor != "start":
            places["text-anchor"] = anchor
        self._add("text", style, places, text)

    def _add(self, tag: str, style: str, attributes: dict[str, str], text: str | None = None) -> None:
        SubElement(self._into, tag, {**({"class": style} if style else {}), **attributes}).text = text


def number(value: float) -> str:
    """A length, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")


def text_width(text: str, size: float = FONT) -> float:
    """About how wide a text is."""
    return CHARACTER * size * len(text)


def shortened(text: str, characters: int) -> str:
    """A text with its middle left out if it is long."""
    if len(text) <= characters:
        return text
    head = (characters - 1) // 2
    return f"{text[:head]}…{text[len(text) - (characters - 1 - head) :]}"


@dataclass(frozen=True)
class Scale:
    """From numbers to places along an axis.

    Attributes:
        forward: a rising function that spreads the numbers evenly.
        first, last: what it makes of the numbers at the two ends; never the same.
        low, high: those numbers, as far as a float can hold them.
        start, end: their places.
        candidates: numbers that may be ticks, those that should rather be there first.
    """

    forward: Callable[[float], float]
    first: float
    last: float
    low: float
    high: float
    start: float
    end: float
    candidates: tuple[float, ...]

    def at(self, value: float) -> float:
        """The place of a number."""
        return self.start + (self.end - self.start) * (self.forward(value) - self.first) / (self.last - self.first)

    def ticks(self, apart: float) -> list[float]:
        """Numbers to mark on the axis, at least so far from each other."""
        chosen: list[float] = []
        for value in self.candidates:
            if self.low <= value <= self.high and all(abs(self.at(value) - self.at(o)) >= apart for o in chosen):
                chosen.append(value)
        return sorted(chosen)


MARGIN = 0.06
"""Of an axis, left free on both sides of the numbers."""
SPREAD = 20.0
"""Numbers that differ by more than this factor are spread out."""
FINEST = 1e-12
"""Of the largest number: what is smaller is drawn as nothing where there are numbers of both signs, or zeros."""
ALIKE = 1e-9
"""Numbers that differ by a smaller share share a tick."""
LARGEST, SMALLEST = sys.float_info.max, sys.float_info.min
"""Of the numbers that a float holds with all its digits."""


def fitting_scale(values: Sequence[float], start: float, end: float, *, zero: bool = False) -> Scale:
    """A scale for some numbers: linear, or spread out if that would squeeze most of them.

    Args:
        zero: whether it begins at zero, as a scale of amounts should.
    """
    sizes = sorted(abs(value) for value in values)
    median, largest = sizes[len(sizes) // 2], sizes[-1]
    if zero or largest <= SPREAD * median or largest == 0:
        return linear_scale(values, start, end, zero=zero)
    if min(values) > 0:
        return log_scale(values, start, end)
    unit = max(median or largest / SPREAD, FINEST * largest, SMALLEST)
    return _padded(
        lambda value: math.asinh(value / unit),
        lambda place: unit * math.sinh(place),
        values,
        start,
        end,
        (0.0, *_decades(unit, largest)),
    )


def linear_scale(values: Sequence[float], start: float, end: float, *, zero: bool = False) -> Scale:
    """Equal steps are equally long."""
    low, high = (0.0 if zero else min(values)), max(values)
    unit = max(abs(low), abs(high)) or 1.0
    first, last = low / unit, high / unit
    if first == last:
        first, last = (first - 0.05, last + 0.05) if first else (0.0 if zero else -1.0, 1.0)
    room = MARGIN * (last - first)
    first, last = first if zero else first - room, last + room
    low, high = _held(unit * first), _held(unit * last)
    return Scale(lambda value: value / unit, first, last, low, high, start, end, tuple(_round_steps(low, high)))


def log_scale(values: Sequence[float], start: float, end: float, candidates: Sequence[float] = ()) -> Scale:
    """Equal factors are equally long; all numbers must be positive.

    Args:
        candidates: numbers that may be ticks, if at least two of them are in the range.
    """
    low, high = min(values), max(values)
    ticks = tuple(candidates) or _decades(low, high)
    if sum(low <= tick <= high for tick in ticks) < 2:
        ticks = (*ticks, *_round_steps(low, high))
    return _padded(math.log, math.exp, values, start, end, tuple(tick for tick in ticks if tick > 0))


def _padded(
    forward: Callable[[float], float],
    back: Callable[[float], float],
    values: Sequence[float],
    start: float,
    end: float,
    candidates: tuple[float, ...],
) -> Scale:
    """A scale with room on both sides of the numbers."""
    first, last = forward(min(values)), forward(max(values))
    room = MARGIN * (last - first) or 0.5
    first, last = first - room, last + room
    return Scale(forward, first, last, _end(back, first), _end(back, last), start, end, candidates)


def _end(back: Callable[[float], float], place: float) -> float:
    """The number at an end of an axis."""
    try:
        return _held(back(place))
    except OverflowError:
        return math.copysign(LARGEST, place)


def _held(value: float) -> float:
    """The nearest number that is not infinite."""
    return min(max(value, -LARGEST), LARGEST)


def _round_steps(low: float, high: float, count: int = 6) -> list[float]:
    """Multiples of a round number, up to `count` steps apart; of numbers that are as good as equal just the first."""
    rough = high / count - low / count
    if rough <= max(ALIKE / count * max(abs(low), abs(high)), SMALLEST):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [float(f"{index * step:.12g}") for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(smallest: float, largest: float) -> tuple[float, ...]:
    """Powers of ten, then five times and twice these, of both signs."""
    bottom, top = (math.floor(math.log10(size)) for size in (smallest, largest))
    powers = [float(f"1e{power}") for power in range(top + 1, bottom - 1, -1)]
    return tuple(sign * factor * power for factor in (1, 5, 2) for power in powers for sign in (1, -1))


def tick_text(value: float) -> str:
    """A number on an axis."""
    return f"{value:,.0f}" if LONG <= abs(value) < LONGEST else f"{value:.4g}"
