"""Pictures of profiles and plans. Importing this loads matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import OutputError
from ..files import check_writable, write_bytes
from ..plan import Plan
from ..profile import Profile
from ..studies.explain import Frontier

FORMATS = (".png", ".svg", ".pdf")
KEY, VALUE = "#1f77b4", "#ff7f0e"
SIDE = 0.2
"""Distance of a bar from the middle of its layer."""


Point = tuple[float, float]


def check_plot(path: Path) -> None:
    """Raise OutputError, before any work, if a picture cannot be written there."""
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"cannot draw {path}: its name must end in {', '.join(FORMATS)}")
    check_writable(path)


def plot_profiles(profiles: Sequence[tuple[str, Profile]], path: Path) -> Path:
    """One panel a score: mean by layer for keys and values, with the spread over samples. Raises OutputError."""
    scores = [(f"{name}: {each}", score) for name, profile in profiles for each, score in profile.scores.items()]
    figure, panels = _panels(len(scores))
    for axes, (name, score) in zip(panels, scores, strict=True):
        layers = sorted(score.layers.items())
        bars(axes, [(index, layer.k.mean, layer.v.mean) for index, layer in layers])
        for side, kind in ((-SIDE, "k"), (SIDE, "v")):
            statistics = [(index + side, getattr(layer, kind)) for index, layer in layers]
            at, means, spreads = zip(*((x, each.mean, each.std) for x, each in statistics), strict=True)
            axes.errorbar(at, means, yerr=spreads, fmt="none", ecolor="black", elinewidth=0.8)
        axes.set_title(f"{name}, mean and spread over {score.calibration.samples} samples")
        axes.set_ylabel(score.unit)
        axes.set_yscale("log" if any(score.choices) else "linear")
    return save(figure, path)


def plot_plans(plans: Sequence[tuple[str, Plan]], path: Path, frontier: Frontier | None = None) -> Path:
    """One panel a plan: bits by layer for keys and values. One more for the frontier, if any. Raises OutputError."""
    figure, panels = _panels(len(plans) + (frontier is not None))
    for axes, (name, plan) in zip(panels, plans, strict=False):
        bars(axes, [(index, layer.k.bits, layer.v.bits) for index, layer in sorted(plan.layers.items())])
        axes.set_title(f"{name}: {plan.bits.nominal:.4g} bits nominal, {plan.bits.stored:.4g} stored")
        axes.set_ylabel("bits")
    if frontier is not None:
        _draw_frontier(panels[-1], frontier)
    return save(figure, path)


def _draw_frontier(axes: Axes, frontier: Frontier) -> None:
    axes.plot(*zip(*frontier.best, strict=True), marker=".", color="#9e9e9e", label="best for every budget")
    axes.plot(*frontier.plan, marker="*", markersize=14, linestyle="none", color="#2ca02c", label="this plan")
    axes.set(yscale="log", xlabel="stored bits", ylabel="nats a token", title=f"predicted loss, by {frontier.score}")
    axes.legend()


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, 3.2 * count), layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def bars(axes: Axes, rows: Sequence[tuple[int, float, float]]) -> None:
    """Two bars a layer, keys on the left; rows are (layer, keys, values)."""
    for side, column, label, color in ((-SIDE, 1, "keys", KEY), (SIDE, 2, "values", VALUE)):
        axes.bar([row[0] + side for row in rows], [row[column] for row in rows], 2 * SIDE, color=color, label=label)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def save(figure: Figure, path: Path) -> Path:
    """Write a figure whole or not at all. Raises OutputError."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lower().lstrip("."), dpi=150)
    return write_bytes(path, picture.getvalue())
