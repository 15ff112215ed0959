"""The control: as many higher layers as `rank` has, drawn at random. It takes the same bytes and uses no score."""

from __future__ import annotations

from random import Random

from ..problem import Decision, Method, Problem
from .rank import raise_in_order


def solve(problem: Problem) -> Decision:
    """Raise layers in random orders, one for keys and one for values, drawn from the seed. Raises BudgetError."""
    draw, count = Random(problem.seed), len(problem.layers)
    return raise_in_order(problem, draw.sample(problem.layers, count), draw.sample(problem.layers, count))


METHOD = Method(uses=("seed",), solve=solve)
