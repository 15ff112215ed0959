"""The exact optimum over layers x {K, V} x widths x group sizes: the least predicted loss that the budget allows.

A multiple-choice knapsack (Sinha and Zoltners, 1979) over the score's smoothed curves (`curves.py`), whose losses are
summed over tensors. Under `max_loss` it finds the smallest plan within the predicted loss instead.
"""

from __future__ import annotations

from ..choices import Choices, TensorChoice, choices_by_slot, decide
from ..evictions import solve_with_evictions
from ..heads import choices_by_head, decide_by_head
from ..knapsack import least_cost, least_loss
from ..problem import Decision, Method, Problem


def solve(problem: Problem) -> Decision:
    """Decide the optimum, by KV head, or with shares of tokens to evict, if the problem says so. Raises BudgetError."""
    if problem.evictions:
        return solve_with_evictions(problem)
    if problem.by_head:
        of_heads = choices_by_head(problem)
        return decide_by_head(dict(zip(of_heads, _optimum(problem, list(of_heads.values())), strict=True)))
    slots = choices_by_slot(problem)
    return decide(dict(zip(slots, _optimum(problem, list(slots.values())), strict=True)))


def _optimum(problem: Problem, slots: list[Choices]) -> list[TensorChoice]:
    """Return one choice for every slot. Raises BudgetError."""
    if problem.loss_limit is None:
        problem.check_cost(*problem.cost_range)
        return least_loss(slots, problem.allowance)
    problem.check_loss(sum(choices[-1].loss for choices in slots))
    return least_cost(slots, problem.loss_limit)


METHOD = Method(uses=("score", "group_sizes", "heads", "evictions"), solve=solve)
