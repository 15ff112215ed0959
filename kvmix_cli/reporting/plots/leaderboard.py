"""Plot of a leaderboard: at every budget, all plans by their measured loss. Importing this loads matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from ...studies.leaderboard.board import Board
from ...studies.leaderboard.candidates import RANDOM
from ...studies.leaderboard.standings import Standing
from ..printable import one_line, shortened
from .drawing import Look, new_figure, save, styled
from .quality import ROW, Dot, draw_rows

WIDTH, HEAD = 470, 110
"""Width of a budget's panel, and height of what is above and below its rows, in points."""
COLUMNS = 2
NAMES = 34
"""Characters of the names of one plan, which several candidates may have chosen."""


@styled()
def plot_board(board: Board, path: Path) -> Path:
    """Draw a panel a budget: every plan with the interval of its loss, the best one first. Raises OutputError."""
    measured = [each for each in board.standings if each.loss is not None]
    budgets = {bits: [each for each in measured if each.stored_bits == bits] for bits in _budgets(measured)}
    looks = _looks(measured)
    columns = min(COLUMNS, max(1, len(budgets)))
    tallest = max((len(each) for each in budgets.values()), default=1)
    lines = -(-max(1, len(budgets)) // columns)
    figure = new_figure(WIDTH * columns, (HEAD + ROW * tallest) * lines)
    figure.suptitle("measured loss of every plan at equal stored bits")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in panels[len(budgets) :]:
        axes.set_visible(False)
    for axes, (bits, standings) in zip(panels, budgets.items(), strict=False):
        _draw_budget(axes, bits, standings, looks, tallest)
    return save(figure, path)


def _draw_budget(axes: Axes, bits: float, standings: Sequence[Standing], looks: dict[str, Look], tallest: int) -> None:
    dots = [
        Dot(
            shortened(one_line(", ".join(each.names)), NAMES),
            each.plan.bits.stored,
            each.loss,
            looks[each.names[0]],
            text,
        )
        for each in standings
        if each.loss is not None and (text := f"{each.loss.value:+.4f}")
    ]
    draw_rows(axes, dots, "loss increase in nats a token with its 95 % interval, lower is better", 0.0)
    axes.set_title(f"at most {bits:g} stored bits")
    axes.set_ylim(tallest, 0)


def _budgets(standings: Sequence[Standing]) -> list[float]:
    return sorted({each.stored_bits for each in standings})


def _looks(standings: Sequence[Standing]) -> dict[str, Look]:
    """Return the look of every candidate, the same at all budgets; random plans look alike."""
    names = sorted({name for each in standings for name in each.names if not name.startswith(RANDOM)})
    looks = {name: Look(number) for number, name in enumerate(names)}
    return looks | {name: Look(-1) for each in standings for name in each.names if name.startswith(RANDOM)}
