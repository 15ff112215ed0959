"""A plot's frame: axes with round numbers and a faint grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .drawing import FONT, PANEL, Drawing, Scale, text_width, tick_text
from .labels import Box, crossed

HEIGHT = 320
LEFT, RIGHT, TOP, BOTTOM = 54.0, 14.0, 30.0, 44.0
FRAME = Box(LEFT, TOP, PANEL - RIGHT, HEIGHT - BOTTOM)
HIDDEN = 10.0
"""How much worse it is to hide a point than to cross a line."""
ROWS_APART, COLUMNS_APART = 30.0, 44.0

Formatter = Callable[[float], str]


class Axis(NamedTuple):
    """A scale, what it measures, and how its ticks are written."""

    scale: Scale
    title: str
    text: Formatter = tick_text


def draw_axes(drawing: Drawing, x: Axis, y: Axis, frame: Box = FRAME) -> None:
    """Grid, ticks and titles; the title of the upright axis stands above it, where it is read without turning."""
    for value in y.scale.ticks(ROWS_APART):
        at = y.scale.at(value)
        drawing.line((frame.left, at), (frame.right, at), "grid")
        drawing.text((frame.left - 7, at + FONT / 3), y.text(value), "tick", "end")
    for value in x.scale.ticks(COLUMNS_APART):
        at = x.scale.at(value)
        drawing.line((at, frame.bottom), (at, frame.bottom + 4), "axis")
        drawing.text((at, frame.bottom + 17), x.text(value), "tick", "middle")
    drawing.line((frame.left, frame.bottom), (frame.right, frame.bottom), "axis")
    drawing.text((0, FONT), y.title, "title")
    drawing.text(((frame.left + frame.right) / 2, frame.bottom + 36), x.title, "title", "middle")


def draw_level_name(
    drawing: Drawing, at: float, text: str, taken: Sequence[Box], lines: Sequence[Box], frame: Box = FRAME
) -> Box:
    """The name of a line across a plot, where it hides least; gives its place."""
    width = text_width(text)
    places = [
        Box(left, base - FONT, left + width, base + 3)
        for left in (frame.right - width, frame.left + 4, (frame.left + frame.right - width) / 2)
        for base in (at - 5, at + FONT + 2)
    ]
    inside = [place for place in places if place.top >= frame.top - 4 and place.bottom <= frame.bottom]
    chosen = min(inside or places, key=lambda place: crossed(place, taken) * HIDDEN + crossed(place, lines))
    drawing.text((chosen.left, chosen.bottom - 3), text, "note")
    return chosen
