"""A family of plans along the whole range of stored bits: `ilp` at every eighth of a bit, from the same choices.

A plan that loses no less than a smaller one is left out, so the family ends where more bits are predicted to gain
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ..budgets import Budget
from ..choices import choices_by_slot, decide
from ..knapsack import least_loss
from ..problem import Decision, Method, Problem

METHOD = Method(uses=("score", "group_sizes"))
STEP = 0.125
"""Stored bits between two plans, doubled until there are at most `MOST` plans."""
MOST = 48


def solve_range(problem: Problem) -> list[tuple[Budget, Decision]]:
    """Return budgets, ascending, with the decision for each; the problem's own budget is not used."""
    problem = replace(problem, budget=Budget(stored_bits=0))
    slots = choices_by_slot(problem)
    family: list[tuple[Budget, Decision]] = []
    least = math.inf
    for stored_bits in _steps(problem):
        budget = Budget(stored_bits=stored_bits)
        chosen = least_loss(list(slots.values()), replace(problem, budget=budget).allowance)
        loss = math.fsum(choice.loss for choice in chosen)
        if loss < least:
            family.append((budget, decide(dict(zip(slots, chosen, strict=True)))))
            least = loss
    return family


def _steps(problem: Problem) -> Iterator[float]:
    """Return the multiples of a step, a power of two, within the range of the choices."""
    pinned = problem.pinned_cost
    least, most = (problem.budget.bits(cost + pinned, problem.cache, problem.model) for cost in problem.cost_range)
    step = STEP
    while (most - least) / step > MOST:
        step *= 2
    first = math.ceil(least / step - 1e-9)
    return (place * step for place in range(first, max(first, math.floor(most / step)) + 1))
