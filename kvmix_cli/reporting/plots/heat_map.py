"""Pictures of what was recalled, by where it stood. Importing this loads matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ...evaluation.grid import RecallCell, RecallGrid, grid
from ...evaluation.results import Report, Row
from ..printable import one_line, shortened
from .drawing import CARD, GRID, SOFT, hint, new_figure, save, styled

COLORS = "viridis"
"""Told apart by colour-blind readers too, and in grey: dark is lost, bright is recalled."""
PANELS = 3
"""In a row, at most."""
CELL = 44, 26
"""Width and height of a cell with its count, in points."""
LEAST = 200, 100
"""Width and height of a panel, at the least."""
MARGINS = 70, 70
"""Room of a panel for its title and labels, in points."""
SIDES = 110, 80
"""Room of the picture for the names of the axes and the scale, in points."""
WIDEST = 900
"""A picture with more columns has narrower cells."""
LETTER = 7.6
"""Mean width of a character, in points."""


def plot_heat_maps(report: Report, path: Path) -> Path | None:
    """Write the picture of a report; return None if its task has nothing of the kind. Raises OutputError."""
    figure = heat_maps(report)
    return None if figure is None else save(figure, path)


@styled()
def heat_maps(report: Report) -> Figure | None:
    """Return a figure with a panel a row of the report; None if none of them says where its values stood."""
    grids = [(row, found) for row in report.rows if (found := grid(row.records)) is not None]
    if not grids:
        return None
    first = grids[0][1]
    across = min(PANELS, len(grids))
    lines = -(-len(grids) // across)
    cell = min(CELL[0], WIDEST / across / len(first.columns))
    width, height = max(LEAST[0], cell * len(first.columns)), max(LEAST[1], CELL[1] * len(first.rows))
    figure = new_figure(across * (width + MARGINS[0]) + SIDES[0], lines * (height + MARGINS[1]) + SIDES[1])
    panels = list(figure.subplots(lines, across, squeeze=False).flat)
    for axes in panels[len(grids) :]:
        axes.remove()
    for axes, (row, found) in zip(panels, grids, strict=False):
        mesh = draw_heat_map(axes, found, width)
        axes.set_title(_title(row, found))
        axes.set(xlabel="", ylabel="")
    bar = figure.colorbar(mesh, ax=panels[: len(grids)], label="recalled", format=PercentFormatter(1), pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    figure.suptitle(f"{one_line(report.task)}: values recalled of those asked for", fontweight="bold")
    figure.supxlabel(first.across, color=SOFT)
    figure.supylabel(first.down, color=SOFT)
    return figure


@styled()
def draw_heat_map(axes: Axes, found: RecallGrid, width: float) -> QuadMesh:
    """Draw a grid, the beginning of the context at the top, with counts where cells have room for them.

    Args:
        width: about that of the axes, in points.
    """
    shares = [[float("nan") if cell is None else cell.share for cell in row] for row in found.cells]
    colors = matplotlib.colormaps[COLORS].with_extremes(bad=GRID)
    axes.grid(visible=False)
    mesh = axes.pcolormesh(shares, cmap=colors, norm=Normalize(0, 1), edgecolors=CARD, linewidth=1)
    counts = [f"{sum(c.recalled for c in cells)} of {sum(c.count for c in cells)}" for cells in _by_row(found)]
    hint(mesh, "\n".join(f"{found.down} {name}: {count}" for name, count in zip(found.rows, counts, strict=True)))
    axes.invert_yaxis()
    axes.set_yticks([row + 0.5 for row in range(len(found.rows))], found.rows)
    _name_columns(axes, found.columns, width)
    axes.set(xlabel=found.across, ylabel=found.down)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    labels = [(x, y, _label(cell), cell) for y, row in enumerate(found.cells) for x, cell in enumerate(row) if cell]
    if max(len(text) for _, _, text, _ in labels) * LETTER < width / len(found.columns):
        for x, y, text, cell in labels:
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=_ink(cell))
    return mesh


def _name_columns(axes: Axes, columns: Sequence[str], width: float) -> None:
    """Name as many columns as have room."""
    longest = max(map(len, columns)) * LETTER + LETTER
    step = max(1, math.ceil(longest * len(columns) / width))
    places = range(0, len(columns), step)
    axes.set_xticks([place + 0.5 for place in places], [columns[place] for place in places])


def _by_row(found: RecallGrid) -> list[list[RecallCell]]:
    return [[cell for cell in row if cell is not None] for row in found.cells]


def counted(found: RecallGrid) -> str:
    """Return `50 of 60 recalled`."""
    cells = [cell for row in _by_row(found) for cell in row]
    return f"{sum(cell.recalled for cell in cells)} of {sum(cell.count for cell in cells)} recalled"


def _title(row: Row, found: RecallGrid) -> str:
    stored = "" if row.stored_bits is None else f"{row.stored_bits:.4g} bits stored, "
    return f"{shortened(one_line(row.plan), 30)}\n{stored}{counted(found)}"


def _label(cell: RecallCell) -> str:
    """Return `5/6`, or a percentage where that would be long."""
    return f"{cell.recalled}/{cell.count}" if cell.count < 100 else f"{cell.share:.0%}"


def _ink(cell: RecallCell) -> str:
    """Return black for bright cells, white for dark ones, in every theme."""
    return "black" if cell.share > 0.55 else "#fefefe"
