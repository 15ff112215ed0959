"""Heat maps of recall: which values were read out of the cache again, by where they had been stated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .drawing import FONT, Drawing, text_width

if TYPE_CHECKING:
    from ...evaluation.grid import Cell, Grid

WIDTH = 300
LEFT, RIGHT, TOP, FOOT = 58.0, 4.0, 4.0, 38.0
ROW, WIDEST = 20.0, 100.0
SHADES = 10
"""Steps of colour between nothing and everything recalled: `h0` to `h10` in the style sheet."""


def heat_map(grid: Grid, label: str) -> str:
    """A grid as SVG, with the beginning of the context at the top."""
    drawing = Drawing(WIDTH, TOP + ROW * len(grid.rows) + FOOT, label)
    cell = min(WIDEST, (WIDTH - LEFT - RIGHT) / len(grid.columns))
    for row, (name, cells) in enumerate(zip(grid.rows, grid.cells, strict=True)):
        top = TOP + row * ROW
        drawing.text((LEFT - 6, top + ROW * 0.7), name, "tick", "end")
        for column, found in enumerate(cells):
            where = f"{grid.down} {name}, {grid.across} {grid.columns[column]}"
            _draw_cell(drawing, (LEFT + column * cell, top), cell, found, where)
    _draw_columns(drawing, grid, cell, TOP + ROW * len(grid.rows))
    return drawing.markup()


def _draw_cell(drawing: Drawing, corner: tuple[float, float], width: float, cell: Cell | None, where: str) -> None:
    size = (width - 1, ROW - 1)
    if cell is None:
        drawing.rect(corner, size, "nowhere")
        return
    part = drawing.part(f"h{round(cell.share * SHADES)}", f"{where}\n{cell.recalled} of {cell.count} recalled")
    part.rect(corner, size, "cell")
    text = f"{cell.recalled}/{cell.count}"
    if text_width(text) < size[0]:
        part.text((corner[0] + size[0] / 2, corner[1] + ROW * 0.69), text, "count", "middle")


def _draw_columns(drawing: Drawing, grid: Grid, cell: float, bottom: float) -> None:
    """As many names as have room, and what they are."""
    longest = max(text_width(name) for name in grid.columns) + 8
    step = max(1, -(-int(longest) // max(1, int(cell))))
    for column in range(0, len(grid.columns), step):
        middle = LEFT + (column + 0.5) * cell
        half = text_width(grid.columns[column]) / 2
        at = min(max(middle, LEFT + half), WIDTH - RIGHT - half)
        drawing.text((at, bottom + FONT + 3), grid.columns[column], "tick", "middle")
    drawing.text((LEFT + cell * len(grid.columns) / 2, bottom + 2 * FONT + 7), grid.across, "title", "middle")
