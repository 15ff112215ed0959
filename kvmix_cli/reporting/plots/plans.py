"""Pictures of profiles and plans. Importing this loads matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...counting import counted
from ...plan import Plan
from ...profile import Profile, Score
from ...studies.explain import Frontier
from ..printable import one_line, shortened
from .drawing import INK, KEY, POINTS, SOFT, VALUE, check_plot, describe, figure_of, fit_axis, new_figure, save, styled
from .labels import name_points

__all__ = [
    "Frontier",
    "Point",
    "check_plot",
    "draw_bits",
    "draw_plan",
    "draw_scores",
    "plot_plans",
    "plot_profiles",
    "save",
]

WIDTH, PANEL = 640, 235
"""Width of a picture and height of each of its panels, in points."""
SIDE = 0.2
"""Distance of a bar from the middle of its layer."""
TITLE = 70
"""Characters of a panel's title."""
HEADROOM = 1.5
"""Height of the axes above the highest bar."""
DIGIT = 10
"""Width of a digit and of what should be free beside it, in points."""

Point = tuple[float, float]


@styled()
def plot_profiles(profiles: Sequence[tuple[str, Profile]], path: Path) -> Path:
    """Draw a panel a score: mean by layer for keys and values, with the spread over samples. Raises OutputError."""
    scores = [(f"{name}: {each}", score) for name, profile in profiles for each, score in profile.scores.items()]
    figure, panels = _panels(len(scores))
    for axes, (name, score) in zip(panels, scores, strict=True):
        draw_scores(axes, score, _title(name, _samples_text(score.calibration.samples)))
    return save(figure, path)


@styled()
def plot_plans(plans: Sequence[tuple[str, Plan]], path: Path, frontier: Frontier | None = None) -> Path:
    """Draw a panel a plan: bits by layer. One more shows the frontier, if there is one. Raises OutputError."""
    figure, panels = _panels(len(plans) + (frontier is not None))
    for axes, (name, plan) in zip(panels, plans, strict=False):
        numbers = f": {plan.bits.nominal:.4g} bits nominal, {plan.bits.stored:.4g} stored"
        draw_plan(axes, plan, _title(name, numbers))
    if frontier is not None:
        _draw_frontier(panels[-1], frontier)
    return save(figure, path)


@styled()
def draw_scores(axes: Axes, score: Score, title: str) -> None:
    """Draw a score: two bars a layer, keys on the left, with their spread over the samples."""
    layers = sorted(score.layers.items())
    for side, kind, label, color in ((-SIDE, "k", "keys", KEY), (SIDE, "v", "values", VALUE)):
        statistics = [getattr(layer, kind) for _, layer in layers]
        at = [index + side for index, _ in layers]
        axes.bar(at, [each.mean for each in statistics], 2 * SIDE, color=color, label=label)
        if score.calibration.samples > 1:  # one sample has no spread
            spreads = [each.std for each in statistics]
            axes.errorbar(at, [each.mean for each in statistics], yerr=spreads, fmt="none", ecolor=INK, elinewidth=0.8)
    describe(axes, x="layer", y=one_line(score.unit), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yscale("log" if any(score.choices) else "linear")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


def draw_plan(axes: Axes, plan: Plan, title: str) -> None:
    """Draw the bits of every layer of a plan, see `draw_bits`."""
    draw_bits(axes, {index: (layer.k.mean_width, layer.v.mean_width) for index, layer in plan.layers.items()}, title)


@styled()
def draw_bits(axes: Axes, layers: Mapping[int, tuple[float, float]], title: str = "") -> None:
    """Draw the bits of every layer, keys upwards, values downwards; a layer that the plan leaves alone has no number.

    Args:
        layers: bits of keys and of values, by layer; of transform codes their mean.
    """
    count, most = 1 + max(layers), math.ceil(max(width for pair in layers.values() for width in pair)) or 1
    edges = [index - 0.5 for index in range(count + 1)]
    for kind, (sign, name, color) in enumerate(((1, "keys", KEY), (-1, "values", VALUE))):
        widths = [layers[index][kind] if index in layers else None for index in range(count)]
        axes.stairs([sign * (width or 0) for width in widths], edges, fill=True, color=color)
        _name_widths(axes, widths, sign, color)
        middle, at = 0.5 + 0.25 * sign, "axes fraction"
        axes.annotate(name, (1.015, middle), xycoords=at, va="center", color=color, annotation_clip=False)
    axes.axhline(0, color=SOFT, linewidth=0.8)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(-HEADROOM * most, HEADROOM * most)
    axes.set_yticks([-most, 0, most], [str(most), "0", str(most)])
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 4, 5, 10], min_n_ticks=1))
    describe(axes, x="layer", y="bits", title=title)


def _name_widths(axes: Axes, widths: Sequence[float | None], sign: int, color: str) -> None:
    """Write every width beyond the end of its bar, if the layers of that width beside each other are wide enough."""
    layer = 0.85 * axes.get_window_extent().width / figure_of(axes).dpi * POINTS / len(widths)
    for width, run in groupby(range(len(widths)), key=lambda index: widths[index]):
        if width is None:
            continue
        layers = list(run)
        name = f"{width:.1f}".removesuffix(".0")
        if layer * len(layers) > DIGIT * len(name):
            middle, up = (layers[0] + layers[-1]) / 2, "bottom" if sign > 0 else "top"
            axes.text(middle, sign * width, name, ha="center", va=up, color=color)


def _draw_frontier(axes: Axes, frontier: Frontier) -> None:
    axes.plot(*zip(*frontier.best, strict=True), marker=".", color=SOFT)
    axes.plot(*frontier.plan, marker="*", markersize=14, linestyle="none", color=KEY, zorder=4)
    title = f"predicted loss of the best plan for every budget, by {one_line(frontier.score)}"
    describe(axes, x="stored bits", y="nats a token", title=title)
    fit_axis(axes.yaxis, [loss for _, loss in (*frontier.best, frontier.plan)])
    name_points(axes, [frontier.plan], ["this plan"])


def _samples_text(samples: int) -> str:
    return f", mean and spread over {counted(samples, 'sample')}" if samples > 1 else ", one sample"


def _title(name: str, numbers: str) -> str:
    return f"{shortened(one_line(name), TITLE - len(numbers))}{numbers}"


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = new_figure(WIDTH, PANEL * count)
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])
