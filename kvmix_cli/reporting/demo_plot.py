"""The demo's picture: what was measured, what was decided, and what it cost. Importing this loads matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.results import Report
from ..plan import Plan
from ..profile import Profile
from .plots import bars, save


def plot_demo(profile: Profile, plan: Plan, perplexity: Report, path: Path) -> Path:
    """Scores by layer, bits by layer, and perplexity against stored bits. Raises OutputError."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.2, 1))
    name, score = next(iter(profile.scores.items()))
    scores, bits, quality = (figure.add_subplot(where) for where in (grid[0, 0], grid[1, 0], grid[:, 1]))
    layers = sorted(score.layers.items())
    bars(scores, [(index, layer.k.mean, layer.v.mean) for index, layer in layers])
    scores.set(title=f"1. profile: {name} over {score.calibration.samples} samples", ylabel=name)
    bars(bits, [(index, layer.k.bits, layer.v.bits) for index, layer in sorted(plan.layers.items())])
    bits.set(title=f"2. allocate: {plan.bits.nominal:.3g} bits nominal, {plan.bits.stored:.3g} stored", ylabel="bits")
    _quality(quality, perplexity)
    return save(figure, path)


def _quality(axes: Axes, report: Report) -> None:
    """Perplexity increase of every plan with its interval."""
    rows = [row for row in report.plans if "perplexity_increase_percent" in row.metrics]
    for position, row in enumerate(rows):
        increase = row.metrics["perplexity_increase_percent"]
        axes.bar(position, increase.value, 0.5, color="#2ca02c" if row.plan == "kvmix" else "#9e9e9e")
        spread = [[increase.value - increase.low], [increase.high - increase.value]]
        axes.errorbar(position, increase.value, yerr=spread, fmt="none", ecolor="black", capsize=4)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [f"{row.plan}\n{row.stored_bits:.2f} stored bits" for row in rows])
    axes.set(title="3. eval: perplexity on held-out text", ylabel="% above the unquantized cache")
