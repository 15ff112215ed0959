"""How a plan looks, the same in all plots: a colour, and a shape once the colours are used up."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .drawing import Drawing

if TYPE_CHECKING:
    from ...evaluation.collect import Group, LineKey

COLORS = 7
"""`c0` to `c6` in the style sheet."""
RADIUS = 4.6
SWATCH = 14
CORNERS = {
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": ((0, -1.15), (1.1, 0.8), (-1.1, 0.8)),
    "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
}
SHAPES = ("circle", *CORNERS)


class Look(NamedTuple):
    """Class names of the style sheet, and what a point looks like."""

    color: str
    shape: str

    @property
    def stroke(self) -> str:
        """The style of a line; dashed unless the colour alone tells the plan."""
        return f"stroke {self.color} {self.shape}"


def looks(group: Group) -> dict[LineKey, Look]:
    """Of all lines of a group."""
    plans = [line for line in group.lines if not line.is_reference]
    found = {line.key: Look("reference", "circle") for line in group.lines if line.is_reference}
    for index, line in enumerate(plans):
        found[line.key] = Look(f"c{index % COLORS}", SHAPES[index // COLORS % len(SHAPES)])
    return found


def draw_mark(into: Drawing, at: tuple[float, float], look: Look, radius: float = RADIUS) -> None:
    """A plan's point."""
    style = f"fill {look.color}"
    if look.shape == "circle":
        into.circle(at, radius, style)
    else:
        into.path([(at[0] + radius * x, at[1] + radius * y) for x, y in CORNERS[look.shape]], style, closed=True)


def swatch(look: Look) -> str:
    """A plan's point beside its name in a table."""
    drawing = Drawing(SWATCH, SWATCH, "")
    draw_mark(drawing, (SWATCH / 2, SWATCH / 2), look)
    return drawing.markup()
