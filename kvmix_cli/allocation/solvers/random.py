"""The control: as many higher layers as `rank` would have, but drawn at random. Equal bytes, no knowledge."""

from __future__ import annotations

from random import Random

from ..ladder import climb
from ..problem import Decision, Problem

USES = ("seed",)


def solve(problem: Problem) -> Decision:
    """Keys and values each in an order of their own, drawn from the seed. Raises BudgetError."""
    draw, count = Random(problem.seed), len(problem.layers)
    return climb(problem, draw.sample(problem.layers, count), draw.sample(problem.layers, count))
