"""A family of plans along the whole range of stored bits: `ilp` at every eighth of a bit, from one set of menus.

A plan that is no better than a smaller one is left out: the family ends where more bits are predicted to gain nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ..budgets import Budget
from ..knapsack import least_loss
from ..menus import decision, menus
from ..problem import Decision, Problem

USES = ("score", "group_sizes")
STEP = 0.125
"""Stored bits. It is doubled until there are no more than `MOST` plans."""
MOST = 48


def solve(problem: Problem) -> list[tuple[Budget, Decision]]:
    """Budgets and the decision for each, ascending; the problem's own budget does not matter."""
    problem = replace(problem, budget=Budget(stored_bits=0))
    slots = menus(problem)
    family: list[tuple[Budget, Decision]] = []
    least = math.inf
    for stored_bits in _steps(problem):
        budget = Budget(stored_bits=stored_bits)
        chosen = least_loss(list(slots.values()), replace(problem, budget=budget).allowance)
        loss = math.fsum(option.loss for option in chosen)
        if loss < least:
            family.append((budget, decision(dict(zip(slots, chosen, strict=True)))))
            least = loss
    return family


def _steps(problem: Problem) -> Iterator[float]:
    """Multiples of a step, a power of two, within what the choices can reach."""
    layers, pinned = len(problem.model.quantizable), problem.pinned_cost
    least, most = (
        problem.budget.bits(cost + pinned, layers, problem.cache, problem.model) for cost in problem.cost_range
    )
    step = STEP
    while (most - least) / step > MOST:
        step *= 2
    first = math.ceil(least / step - 1e-9)
    return (place * step for place in range(first, max(first, math.floor(most / step)) + 1))
