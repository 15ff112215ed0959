"""Picture of the demo: what was measured, what was decided, and what it cost. Importing this loads matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...counting import counted
from ...evaluation.results import Report, Row
from ...plan import Plan
from ...profile import Profile
from ..tables.evaluation import format_estimate
from .drawing import Look, new_figure, save, styled
from .plans import draw_plan, draw_scores
from .quality import Dot, draw_rows

INCREASE = "perplexity_increase_percent"
SIZE = 960, 760
"""Width and height, in points."""


@styled()
def plot_demo(profile: Profile, plans: Mapping[str, Plan], perplexity: Report, path: Path) -> Path:
    """Draw the first score by layer, the bits of some plans, and the perplexity of all. Raises OutputError."""
    figure = new_figure(*SIZE)
    grid = figure.add_gridspec(1 + len(plans), 2)
    scores, quality = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[:, 1])
    name, score = next(iter(profile.scores.items()))
    draw_scores(scores, score, f"1. profile: {name}, {counted(score.calibration.samples, 'sample')}")
    for row, (name, plan) in enumerate(plans.items(), 1):
        title = f"2. allocate {name}: {plan.bits.nominal:.3g} bits nominal, {plan.bits.stored:.3g} stored"
        draw_plan(figure.add_subplot(grid[row, 0]), plan, title)
    rows = [row for row in perplexity.plans if INCREASE in row.metrics and row.stored_bits]
    dots = [_dot(row, index) for index, row in enumerate(rows)]
    if dots:
        draw_rows(quality, dots, "perplexity increase in %, lower is better", 0.0)
        quality.set_title("3. eval: perplexity on held-out text, 95 % intervals")
    return save(figure, path)


def _dot(row: Row, index: int) -> Dot:
    stored = row.stored_bits or 0.0
    text = format_estimate(row.metrics[INCREASE], "%").replace(" %", "")
    return Dot(f"{row.plan}, {stored:.2f} stored bits", stored, row.metrics[INCREASE], Look(index), text)
