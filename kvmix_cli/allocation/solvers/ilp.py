"""The exact optimum over layers x {K, V} x widths x group sizes: the least predicted loss that the budget allows.

A multiple-choice knapsack (Sinha and Zoltners, 1979) over the score's smoothed curves (`curves.py`), whose losses are
summed over tensors. Under `max_loss` it finds the smallest plan within the predicted loss instead.
"""

from __future__ import annotations

from ..choices import choices_by_slot, decide
from ..knapsack import least_cost, least_loss
from ..problem import Decision, Method, Problem


def solve(problem: Problem) -> Decision:
    """Decide the optimum. Raises BudgetError."""
    slots = choices_by_slot(problem)
    if problem.loss_limit is None:
        problem.check_cost(*problem.cost_range)
        chosen = least_loss(list(slots.values()), problem.allowance)
    else:
        problem.check_loss(sum(choices[-1].loss for choices in slots.values()))
        chosen = least_cost(list(slots.values()), problem.loss_limit)
    return decide(dict(zip(slots, chosen, strict=True)))


METHOD = Method(uses=("score", "group_sizes"), solve=solve)
