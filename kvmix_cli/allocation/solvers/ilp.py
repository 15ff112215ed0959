"""The exact optimum over layers x {K, V} x widths x group sizes: the least predicted loss that the budget allows.

A multiple-choice knapsack (Sinha and Zoltners, 1979) over the score's cleaned curves (`curves.py`), which are added
over tensors. Under `max_loss` it is the other way round: the smallest plan within the predicted loss.
"""

from __future__ import annotations

from .. import reach
from ..knapsack import least_cost, least_loss
from ..menus import decision, menus
from ..problem import Decision, Problem

USES = ("score", "group_sizes")


def solve(problem: Problem) -> Decision:
    """The optimum. Raises BudgetError."""
    slots = menus(problem)
    if problem.loss_limit is None:
        reach.check_cost(problem, *problem.cost_range)
        chosen = least_loss(list(slots.values()), problem.allowance)
    else:
        reach.check_loss(problem, sum(menu[-1].loss for menu in slots.values()))
        chosen = least_cost(list(slots.values()), problem.loss_limit)
    return decision(dict(zip(slots, chosen, strict=True)))
