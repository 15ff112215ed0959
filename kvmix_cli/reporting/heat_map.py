"""A picture of what was recalled, by where it stood. Importing this loads matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter

from ..evaluation.grid import Cell, Grid, grid
from .plots import save

if TYPE_CHECKING:
    from ..evaluation.results import Report, Row

COLORS = "viridis"
"""Told apart by colour-blind readers too, and in grey: dark is lost, bright is recalled."""
NOWHERE = "#f2f2f2"
"""Where no value stood."""
PANELS = 4
"""In a row, at most."""
LEGIBLE = 14
"""The most columns whose cells have room for their counts."""
SHORT, FEW = 5, 4
"""Characters and columns; more of both, and labels are slanted."""
CELL = 0.52, 0.34
"""Inches, wide and high."""
LEAST = 2.5, 2.0
MARGINS = 0.35, 0.65
"""Of a panel, for its title and labels."""
SIDES = 1.9, 0.9
"""Of the picture, for the names of the axes and the scale."""


def plot_heat_maps(report: Report, path: Path) -> Path | None:
    """Write the picture of a report; None if its task has nothing of the kind. Raises OutputError."""
    figure = heat_maps(report)
    return None if figure is None else save(figure, path)


def heat_maps(report: Report) -> Figure | None:
    """One panel a row of the report; None if none of them says where its values stood."""
    grids = [(row, found) for row in report.rows if (found := grid(row.records)) is not None]
    if not grids:
        return None
    first = grids[0][1]
    figure, panels = _panels(len(grids), len(first.columns), len(first.rows))
    for axes, (row, found) in zip(panels, grids, strict=True):
        image = _draw(axes, found)
        axes.set_title(_title(row, found), fontsize=9.5, linespacing=1.4)
    bar = figure.colorbar(image, ax=panels, label="recalled", format=PercentFormatter(1), aspect=24, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
    figure.suptitle(f"{report.task}: values recalled of those asked for", fontsize=11, fontweight="bold")
    figure.supxlabel(first.across, fontsize=9.5)
    figure.supylabel(first.down, fontsize=9.5)
    return figure


def _panels(count: int, columns: int, rows: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels with room for so many cells, in as few rows of panels as there can be."""
    lines = -(-count // PANELS)
    across = -(-count // lines)
    width, height = (
        max(least, cells * cell) + margin
        for cells, cell, least, margin in zip((columns, rows), CELL, LEAST, MARGINS, strict=True)
    )
    figure = Figure(figsize=(across * width + SIDES[0], lines * height + SIDES[1]), layout="constrained")
    panels = list(figure.subplots(lines, across, squeeze=False, sharex=True, sharey=True).flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _draw(axes: Axes, found: Grid) -> AxesImage:
    shares = [[float("nan") if cell is None else cell.share for cell in row] for row in found.cells]
    colors = matplotlib.colormaps[COLORS].with_extremes(bad=NOWHERE)
    image = axes.imshow(shares, cmap=colors, norm=Normalize(0, 1), aspect="auto")
    axes.set_xticks(range(len(found.columns)), found.columns, fontsize=8)
    axes.set_yticks(range(len(found.rows)), found.rows, fontsize=8)
    if max(map(len, found.columns)) > SHORT and len(found.columns) > FEW:
        axes.tick_params(axis="x", rotation=45)
    axes.set_xticks([place - 0.5 for place in range(1, len(found.columns))], minor=True)
    axes.set_yticks([place - 0.5 for place in range(1, len(found.rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if len(found.columns) <= LEGIBLE:
        for y, row in enumerate(found.cells):
            for x, cell in enumerate(row):
                if cell is not None:
                    axes.text(x, y, _label(cell), ha="center", va="center", fontsize=7.5, color=_ink(cell))
    return image


def _title(row: Row, found: Grid) -> str:
    cells = [cell for line in found.cells for cell in line if cell is not None]
    recalled, count = sum(cell.recalled for cell in cells), sum(cell.count for cell in cells)
    stored = "" if row.stored_bits is None else f"{row.stored_bits:.4g} bits stored, "
    return f"{row.plan}\n{stored}{recalled} of {count} recalled"


def _label(cell: Cell) -> str:
    """`5/6`, or a percentage where that would be long."""
    return f"{cell.recalled}/{cell.count}" if cell.count < 100 else f"{cell.share:.0%}"


def _ink(cell: Cell) -> str:
    """Black on bright, white on dark."""
    return "black" if cell.share > 0.55 else "white"
