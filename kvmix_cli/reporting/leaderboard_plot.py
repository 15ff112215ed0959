"""Plot of a leaderboard: measured loss against stored bits. Importing this loads matplotlib."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from ..studies.leaderboard.board import Board
from ..studies.leaderboard.candidates import RANDOM
from .plots import Point, save

LINEAR = 5e-3
"""Nats per token, half a percent of perplexity. Below it the axis is linear: a loss increase may be zero or less."""


def plot_board(board: Board, path: Path) -> Path:
    """Draw a line for each method, and a dot for each random plan. Raises OutputError."""
    lines: defaultdict[str, list[Point]] = defaultdict(list)
    for each in board.standings:
        for name in each.names:
            if each.loss is not None:
                lines[name].append((each.plan.bits.stored, each.loss.value))
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    dots = [point for name, points in lines.items() if name.startswith(RANDOM) for point in points]
    if dots:
        axes.plot(*zip(*dots, strict=True), ".", color="#9e9e9e", label=RANDOM)
    for name, points in sorted(lines.items()):
        if not name.startswith(RANDOM):
            bold = 2.5 if name == board.champion else 1.0
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=bold, label=name)
    axes.set_yscale("symlog", linthresh=LINEAR)
    axes.set(xlabel="stored bits", ylabel="loss increase, nats a token", title="loss at equal stored bits")
    axes.legend()
    return save(figure, path)
