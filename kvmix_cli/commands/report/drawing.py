"""Drawings as SVG inside a page: its style sheet gives them their colours, so that they follow the reader's theme.

Lengths are in units of a drawing's view box; a panel is as wide as fits a phone and is scaled up from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree.ElementTree import Element, SubElement, tostring

PANEL = 440
FONT = 12.0
CHARACTER = 0.6
"""Mean width of a character, in font sizes."""

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
        start, end: places of `low` and `high`.
        candidates: numbers that may be ticks, those that should rather be there first.
    """

    forward: Callable[[float], float]
    low: float
    high: float
    start: float
    end: float
    candidates: tuple[float, ...]

    def at(self, value: float) -> float:
        """The place of a number."""
        first, last = self.forward(self.low), self.forward(self.high)
        return self.start + (self.end - self.start) * (self.forward(value) - first) / (last - first)

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
    unit = median or largest / SPREAD
    return _padded(lambda value: math.asinh(value / unit), math.sinh, unit, values, start, end, _decades(values))


def linear_scale(values: Sequence[float], start: float, end: float, *, zero: bool = False) -> Scale:
    """Equal steps are equally long."""
    low, high = (0.0 if zero else min(values)), max(values)
    if low == high:
        low, high = (low - abs(low) / 20, high + abs(high) / 20) if low else (-1.0, 1.0)
    room = MARGIN * (high - low)
    low, high = low if zero else low - room, high + room
    return Scale(lambda value: value, low, high, start, end, tuple(_round_steps(low, high)))


def log_scale(values: Sequence[float], start: float, end: float, candidates: Sequence[float] = ()) -> Scale:
    """Equal factors are equally long; all numbers must be positive.

    Args:
        candidates: numbers that may be ticks, if at least two of them are in the range.
    """
    low, high = min(values), max(values)
    ticks = tuple(candidates) or _decades(values)
    if sum(low <= tick <= high for tick in ticks) < 2:
        ticks = (*ticks, *_round_steps(low, high))
    return _padded(math.log, math.exp, 1.0, values, start, end, ticks)


def _padded(
    forward: Callable[[float], float],
    back: Callable[[float], float],
    unit: float,
    values: Sequence[float],
    start: float,
    end: float,
    candidates: tuple[float, ...],
) -> Scale:
    first, last = forward(min(values)), forward(max(values))
    room = MARGIN * (last - first) or 0.5
    return Scale(forward, unit * back(first - room), unit * back(last + room), start, end, candidates)


def _round_steps(low: float, high: float, count: int = 6) -> list[float]:
    """Multiples of a round number, up to `count` steps apart; of equal numbers just that one."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(values: Sequence[float]) -> tuple[float, ...]:
    """Zero, then powers of ten, then twice and five times these, of both signs."""
    largest = max(abs(value) for value in values)
    powers = [10.0**power for power in range(math.floor(math.log10(largest)) + 2, -7, -1)]
    sizes = [factor * power for factor in (1, 5, 2) for power in powers]
    return (0.0, *(sign * size for size in sizes for sign in (1, -1)))


def tick_text(value: float) -> str:
    """A number on an axis."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
