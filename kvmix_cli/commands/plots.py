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

FORMATS = (".png", ".svg", ".pdf")
KEY, VALUE = "#1f77b4", "#ff7f0e"
SIDE = 0.2
"""Distance of a bar from the middle of its layer."""


def check_plot(path: Path) -> None:
    """Raise OutputError, before any work, if a picture cannot be written there."""
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"cannot draw {path}: its name must end in {', '.join(FORMATS)}")
    check_writable(path)


def plot_profiles(profiles: Sequence[tuple[str, Profile]], path: Path) -> Path:
    """One panel a score: mean by layer for keys and values, with the spread over samples. Raises OutputError."""
    scores = [(name, profile, score) for name, profile in profiles for score in profile.scores]
    figure, panels = _panels(len(scores))
    for axes, (name, profile, score) in zip(panels, scores, strict=True):
        layers = sorted(profile.scores[score].layers.items())
        bars(axes, [(index, layer.k.mean, layer.v.mean) for index, layer in layers])
        for side, kind in ((-SIDE, "k"), (SIDE, "v")):
            statistics = [(index + side, getattr(layer, kind)) for index, layer in layers]
            at, means, spreads = zip(*((x, each.mean, each.std) for x, each in statistics), strict=True)
            axes.errorbar(at, means, yerr=spreads, fmt="none", ecolor="black", elinewidth=0.8)
        samples = profile.calibration.samples
        axes.set_title(f"{name}: {score}, mean and spread over {samples} samples")
        axes.set_ylabel(score)
    return save(figure, path)


def plot_plans(plans: Sequence[tuple[str, Plan]], path: Path) -> Path:
    """One panel a plan: bits by layer for keys and values. Raises OutputError."""
    figure, panels = _panels(len(plans))
    for axes, (name, plan) in zip(panels, plans, strict=True):
        bars(axes, [(index, layer.k.bits, layer.v.bits) for index, layer in sorted(plan.layers.items())])
        axes.set_title(f"{name}: {plan.bits.nominal:.4g} bits nominal, {plan.bits.stored:.4g} stored")
        axes.set_ylabel("bits")
    return save(figure, path)


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
