"""Bits of every layer's keys and values, a strip each, plan under plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from .drawing import FONT, PANEL, Drawing, text_width

if TYPE_CHECKING:
    from ...evaluation.collect import Line

LEFT, RIGHT, TOP, FOOT = 42.0, 4.0, 2.0, 18.0
STRIP, GAP = 18.0, 2.0
"""Heights: of a strip, and between the two."""
TICKS_APART = 34.0
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SEAM = 3.0
"""Pieces wider than this are set apart."""


def bits_strips(layers: Mapping[int, tuple[int, int]], label: str) -> str:
    """The strips of one plan as SVG."""
    count = 1 + max(layers)
    cell = (PANEL - LEFT - RIGHT) / count
    drawing = Drawing(PANEL, TOP + 2 * STRIP + GAP + FOOT, label)
    for kind, (title, short) in enumerate((("keys", "K"), ("values", "V"))):
        top = TOP + kind * (STRIP + GAP)
        drawing.text((LEFT - 8, top + STRIP * 0.74), short, "tick", "end")
        _draw_strip(drawing, {index: pair[kind] for index, pair in layers.items()}, title, top, cell)
    _draw_layers(drawing, count, cell, TOP + 2 * STRIP + GAP)
    return drawing.markup()


def used_bits(lines: Sequence[Line]) -> list[int]:
    """All widths that some plan has, ascending."""
    return sorted({width for line in lines for pair in (line.layers or {}).values() for width in pair})


def _draw_strip(drawing: Drawing, widths: Mapping[int, int], title: str, top: float, cell: float) -> None:
    """Neighbours of equal bits in one piece; a layer that the plan leaves alone is empty."""
    ordered = sorted(widths.items())
    for _, run in groupby(enumerate(ordered), key=lambda item: (item[1][0] - item[0], item[1][1])):
        pieces = [entry for _, entry in run]
        first, last, width = pieces[0][0], pieces[-1][0], pieces[0][1]
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        part = drawing.part(f"b{width}", f"{title} of {where}: {width} bits")
        left, room = LEFT + first * cell, (last - first + 1) * cell
        room -= 1 if room > SEAM else 0
        part.rect((left, top), (room, STRIP), "cell")
        if room > text_width(str(width)) + 2:
            part.text((left + room / 2, top + STRIP * 0.74), str(width), "count", "middle")


def _draw_layers(drawing: Drawing, count: int, cell: float, top: float) -> None:
    step = next((step for step in STEPS if step * cell >= TICKS_APART), STEPS[-1]) if cell < TICKS_APART / 2 else 1
    for index in range(0, count, step):
        drawing.text((LEFT + (index + 0.5) * cell, top + FONT + 2), str(index), "tick", "middle")
    drawing.text((LEFT - 8, top + FONT + 2), "layer", "tick", "end")
